"""Training on a Ray cluster of its own whose only node is told to go: `python preempted.py MODEL FOLDER`.

A drained node takes no more work, so this cannot be done to the cluster that other tests use. The
last line of stdout says which checkpoints were seen.
"""

import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
from train_data import run, settings, sft_rows


def drain(folder: Path, seen: set[str], done: threading.Event) -> None:
    """Announce the node's end once a first step is stored, then watch for checkpoints."""
    from ray.core.generated import autoscaler_pb2

    context = ray.get_runtime_context()
    address, node = context.gcs_address, context.get_node_id()
    announced = False
    while not done.is_set():
        seen |= {path.name for path in (folder / "checkpoints").glob("sft-*/step-*")}
        if not announced and list((folder / "metrics/tensorboard/sft").glob("events*")):
            announced, _ = ray._raylet.GcsClient(address=address).drain_node(
                node,
                autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                "the spot instance is taken back",
                int((time.time() + 600) * 1000),
            )
        time.sleep(0.02)


if __name__ == "__main__":
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=temporary)
    seen: set[str] = set()
    done = threading.Event()
    watcher = threading.Thread(target=drain, args=(folder, seen, done), daemon=True)
    watcher.start()
    # A checkpoint every 1000 steps is one that never comes by itself.
    result = run(folder, model, settings(epochs=120, global_batch=2, save_steps=1000), "sft", sft_rows(4))
    done.set()
    watcher.join()
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)
    sys.stdout.write(json.dumps({"seen": sorted(seen), "steps": result.steps}) + "\n")
