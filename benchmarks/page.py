"""How long the page of `superpoint web` takes on 640x480, in headless Chromium: network, decoding, matching.

make web web/node_modules/puppeteer-core && python benchmarks/page.py --model full --threads 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np

from superpoint_trt import packaged
from superpoint_trt.pipeline.web import PageServer, WebOptions

SCRIPT = Path(__file__).resolve().parents[1] / "web" / "tests" / "browser.mjs"
SIZE_WH = (640, 480)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=packaged.PAGE_NETWORK)
    parser.add_argument("--backend", default="wasm", choices=["auto", "wasm", "webgpu"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, PageServer(WebOptions(arguments.model, 0)) as server:
        photo = cv2.imread(str(packaged.PHOTO))
        for name, part in (("a", photo[:384]), ("b", photo[100:484])):
            cv2.imwrite(f"{folder}/{name}.png", cv2.resize(part, SIZE_WH))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"{server.address}?backend={arguments.backend}&threads={arguments.threads}"
        settings = {"browser": shutil.which("chromium"), "address": address, "folder": folder}
        done = subprocess.run(["node", SCRIPT, "speed", json.dumps(settings)], stdout=subprocess.PIPE, check=True)
        server.shutdown()
    seen = json.loads(done.stdout)
    print(f"{arguments.model} on {seen['backend']}, {SIZE_WH[0]}x{SIZE_WH[1]}, 500 keypoints, {len(seen['ms'])} runs")
    for stage in ("network", "decode", "match"):
        ms = [run[stage] for run in seen["ms"]]
        print(f"{stage:<10}median {np.median(ms):7.1f} ms, least {min(ms):7.1f}, p95 {np.percentile(ms, 95):7.1f}")


if __name__ == "__main__":
    main()
