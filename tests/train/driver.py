"""A driver in a process of its own, which a test kills: `python driver.py ADDRESS MODEL FOLDER`."""

import sys
from pathlib import Path

import ray
from train_data import OFTEN_SAVED, run

if __name__ == "__main__":
    address, model, folder = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    run(Path(folder), Path(model), OFTEN_SAVED)
