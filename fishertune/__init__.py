"""FisherTune: tunes the few per cent of a pretrained ViT that matter to the task and to a domain shift."""

__version__ = "0.1.0"
