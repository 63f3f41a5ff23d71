"""Run by test_triton.py in a Python that has nvidia-pytriton, whose wheel carries a Triton server.

triton_server.py schema CONFIG...            each config.pbtxt, parsed by Triton's own schema, as one line of JSON
triton_server.py serve REPOSITORY MODEL OUT.npz IMAGE.npy...
    starts the server, asks for each image, and writes what it answers: keypoints0, scores0, ...; error0 for an error
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def parse(paths):
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    for path in paths:
        config = text_format.Parse(Path(path).read_text(), model_config_pb2.ModelConfig())
        print(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)))


def start(repository, folder):
    """Starts the server with its Python backend; returns the process and its address for HTTP."""
    import pytriton

    carried = Path(pytriton.__file__).parent / "tritonserver"
    backends = Path(folder) / "backends"
    shutil.copytree(carried / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(carried / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(carried / "bin" / "tritonserver"), "--model-repository", str(repository)]
    command += ["--backend-directory", str(backends), "--http-port", str(port), "--http-address", "127.0.0.1"]
    command += ["--allow-grpc", "false", "--allow-metrics", "false"]
    # The stub looks for its libraries relative to its place in the wheel.
    libraries = [str(carried.parents[1] / "nvidia_pytriton.libs"), sys.base_prefix + "/lib"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
    }
    return subprocess.Popen(command, env=environment), f"127.0.0.1:{port}"


def serve(repository, model, out, images):
    import numpy as np
    import tritonclient.http as client

    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        process, address = start(repository, folder)
        try:
            server = client.InferenceServerClient(address, network_timeout=120.0, connection_timeout=120.0)
            for _ in range(300):
                if process.poll() is not None:
                    sys.exit("the server ended")
                try:
                    if server.is_model_ready(model):
                        break
                except OSError:
                    pass
                time.sleep(0.2)
            for index, path in enumerate(images):
                image = np.load(path)
                asked = client.InferInput("image", image.shape, "UINT8")
                asked.set_data_from_numpy(image)
                try:
                    answer = server.infer(model, [asked])
                except client.InferenceServerException as error:
                    answers[f"error{index}"] = np.array(str(error))
                    continue
                for name in ("keypoints", "scores", "descriptors", "image_size"):
                    answers[f"{name}{index}"] = answer.as_numpy(name)
        finally:
            process.terminate()
            process.wait(60)
    np.savez(out, **answers)


if __name__ == "__main__":
    if sys.argv[1] == "schema":
        parse(sys.argv[2:])
    else:
        serve(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
