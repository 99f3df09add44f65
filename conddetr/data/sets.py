"""The type of a data set for training and evaluation."""

from conddetr.data.coco import CocoDetection
from conddetr.data.synthetic import SyntheticShapes

ImageSet = CocoDetection | SyntheticShapes
