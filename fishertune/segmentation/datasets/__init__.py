"""Data sets: folders of images, and procedural street scenes."""
