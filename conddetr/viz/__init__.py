"""Pictures: detections and attention maps."""
