"""The image, built and run when asked: TEST_IMAGE=cpu (or cuda) pytest tests/test_docker.py

Docker builds it where its engine answers, else buildah. STORAGE_DRIVER=vfs makes buildah work in a
container, too.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

WHEELS = os.environ.get("TEST_IMAGE")
TAG = "localhost/characters-test"
BUILDAH = ["--isolation", "chroot"]  # needs root, but no engine and no name spaces


def output(*command: str | Path) -> str:
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 0, f"{command} failed; its stderr tells why"
    return run.stdout


@pytest.fixture
def answers() -> list[str]:
    """What the image prints for tests/samples, without a network."""
    if not WHEELS:
        pytest.skip("builds the image only where TEST_IMAGE says which: cpu or cuda")
    build = ["--tag", TAG, "--build-arg", f"WHEELS={WHEELS}", ROOT]
    volume = ["--volume", f"{ROOT}/tests/samples:/test/data:ro"]
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        output("docker", "build", *build)
        closed = ["--rm", "--network", "none", "--read-only", "--cap-drop", "ALL"]
        return output("docker", "run", *closed, *volume, TAG).splitlines()
    if not shutil.which("buildah"):
        pytest.skip("neither a Docker engine nor buildah is here")
    output("buildah", "build", *BUILDAH, "--network", "host", *build)
    container = output("buildah", "from", TAG).strip()
    told = json.loads(output("buildah", "inspect", container))["OCIv1"]["config"]
    run = ["unshare", "--net", "buildah", "run", *BUILDAH, "--user", told["User"], *volume]
    said = output(*run, container, "--", *told["Entrypoint"], *told["Cmd"]).splitlines()
    output("buildah", "rm", container)
    return said


def test_image_names_the_samples(answers):
    files = sorted((ROOT / "tests" / "samples").iterdir())
    assert [line[5:] for line in answers] == [f"/test/data/{file.name}" for file in files]
    right = sum(
        chr(int(line[:3])) == file.name[0] for line, file in zip(answers, files, strict=True)
    )
    assert right > 0.9 * len(files)


def test_locks_hold_what_inference_needs_and_what_reads_heic():
    """The packages of requirements.txt, but for those of training; each by hash."""
    needed = re.findall(r"^[a-z][a-z-]*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    needed = {*needed, "pillow-heif"} - {"torchvision", "wandb"}
    for wheels in ("cpu", "cuda"):
        lock = (ROOT / ".docker" / f"{wheels}.lock").read_text()
        hashed = re.findall(r"^([a-z-]+)==[^\n]* \\\n    --hash=sha256:", lock, re.MULTILINE)
        assert needed <= set(hashed)
