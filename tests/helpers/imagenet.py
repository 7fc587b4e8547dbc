"""The ImageNet script on a few generated JPEGs."""

from helpers.processes import ROOT

SCRIPTS = ROOT / "ImageNet"
CLASSES, TRAIN_IMAGES, VAL_IMAGES = 4, 8, 4
