#!/usr/bin/env python
"""The command `prepare_cuts_dict.py`: bins and cuts from EventDisplay's MSCW files."""

import sys

from image_extractor.prepare_cuts_dict import main

if __name__ == "__main__":
    sys.exit(main())
