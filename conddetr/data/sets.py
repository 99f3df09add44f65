"""What a model is trained and evaluated on, as a type."""

from conddetr.data.coco import CocoDetection
from conddetr.data.synthetic import SyntheticShapes

ImageSet = CocoDetection | SyntheticShapes
