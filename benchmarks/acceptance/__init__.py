"""The parts of ``gpu_acceptance.py``: is every kernel right and fast on this card?

To read one operator, open ``parts/<operator>.py``: its checks against float64, its timed work with bytes, FLOPs and
rivals, and its variants stand together there. ``parts/__init__.py`` is the list and the order of everything.

- ``operator.py``: what such a file provides; ``compare.py``: right or wrong; ``race.py``: fast or slow, with rivals.
- ``measure.py``: the device with its random data, its clock, its memory.
- ``records.py``: what a part finds; ``results.py``: the JSON file, and going on where a run was cut.
- ``runner.py``: part after part within the time; ``supervise.py``: a part that kills its process costs itself only.
- ``goals.py``: figures against what was promised; ``report.py`` and ``roofline.py``: tables and a picture.
"""
