"""From images, videos and cameras to detections, pictures and files.

`sources` finds the inputs, `video` reads and writes frames, `stream` runs the model on batches, `results` writes the
detections to files, and `session` does all of it for `conddetr predict`. The results' types are in
`conddetr.detection`, because `Detector` returns them too.
"""
