"""Opens images from files, lists and tars, drawn and torchvision's sets, and the user's own code."""
