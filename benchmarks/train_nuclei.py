# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Train the detector of nuclei from scratch: the script behind its checkpoint.

    PSAQ_NUCLEI=DIR python benchmarks/train_nuclei.py          # --resume goes on

DIR holds images/, train.json and test.json in COCO's format; the config beside the
checkpoint, benchmarks/models/mask_rcnn_swin_nuclei.py, says which images they are.
Trains on the one file, tests once at the end on the other.
"""
import argparse
import sys

from experiment import MODELS, NUCLEI  # finds demo/
from train import add_options, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add_options(parser)
    args = parser.parse_args()
    if not NUCLEI.exists():
        sys.exit(f'{NUCLEI} is not here: PSAQ_NUCLEI names the folder of the images')
    train(MODELS['nuclei'][0], args)


if __name__ == '__main__':
    main()
