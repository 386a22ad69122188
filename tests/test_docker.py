"""The image, as far as no Docker engine is needed: its recipe, its lock files, and a replay.

The replay reads the Dockerfile, lays out what it copies in an empty root folder, and runs its entry
point there as Docker would with --network none --read-only --cap-drop ALL: as its user, with no
Python package but those that its lock file brings. What stays unproved is that the base image is
there and that `docker build` runs these steps.
"""

import ast
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

SCRIPTS = ("CNN.py", "inference.py")
LOCKS = (".docker/cpu.lock", ".docker/cuda.lock")
IMPORTED_AS = {"PIL": "pillow"}
PYTHON = "3.11"  # of the base image, and so of the lock files
DATA = "/test/data"  # where the user's folder appears
CONTAINER_TOOLS = ("unshare", "mount", "chroot", "setpriv")

# In name spaces of its own, so that its mounts end with it. As in a container, /proc shows its own
# processes, /dev holds little, and /dev/shm is all that can be written to.
SANDBOX = """
set -euo pipefail
root=$1 user=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
while IFS=: read -r path target; do
    mkdir -p "$root$target"
    mount --bind "$path" "$root$target"
    mount -o remount,bind,ro "$root$target"
done < "$root/etc/shown"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev"
mkdir "$root/dev/shm"
for device in null zero random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -o remount,ro "$root/dev"
mount -t tmpfs -o size=64m tmpfs "$root/dev/shm"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid="${user%:*}" --regid="${user#*:}" --clear-groups \
    --bounding-set=-all --inh-caps=-all --no-new-privs env -i "$@"
"""

PROBE = """
import errno, json, os, socket
found = {"user": [os.getuid(), os.getgid()], "groups": os.getgroups(), "writable": []}
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
found["capabilities"] = sorted({int(status[k], 16) for k in status if k.startswith("Cap")})
found["networks"] = [name for _, name in socket.if_nameindex()]
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as error:
    found["connection"] = errno.errorcode[error.errno]
for folder in ("/", "/app", "/dev", "/dev/shm", "/etc", "/packages", "/test/data", "/tmp", "/usr"):
    try:
        os.close(os.open(folder + "/probe", os.O_CREAT | os.O_WRONLY))
        found["writable"].append(folder)
    except OSError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Image:
    """What a Dockerfile says of the image."""

    base: str
    runs: list[str]
    copies: list[tuple[list[str], str]]  # sources, target
    environment: dict[str, str]
    folder: str
    user: str
    command: list[str]  # entry point and its default arguments


def read_dockerfile(path: Path) -> Image:
    """Read a Dockerfile of one stage. Raises on an instruction that this reader doesn't know."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    runs, copies, environment, last = [], [], {}, {}
    for word, rest in steps:
        if word == "RUN":
            runs.append(rest)
        elif word == "COPY":
            paths = [part for part in rest.split() if not part.startswith("--")]
            copies.append((paths[:-1], paths[-1]))
        elif word == "ENV":
            environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif word in ("FROM", "ARG", "WORKDIR", "USER", "ENTRYPOINT", "CMD") and word not in last:
            last[word] = rest
        else:
            raise ValueError(f"{path}: {word} {rest}")
    command = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    return Image(last["FROM"], runs, copies, environment, last["WORKDIR"], last["USER"], command)


def read_lock(path: Path) -> dict[str, Version]:
    """Return the packages of a lock file. Raises unless each has one version and hashes."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "--"))]
    packages = {}
    for line in lines:
        name, version, hashes = re.fullmatch(
            r"([\w.-]+)==(\S+)((?: +--hash=\S+)+) *", line
        ).groups()
        for digest in hashes.split():
            assert re.fullmatch("--hash=sha256:[0-9a-f]{64}", digest), digest
        packages[canonicalize_name(name)] = Version(version)
    assert len(packages) == len(lines)
    return packages


def reaches_builder(path: str, rules: list[str]) -> bool:
    """Tell whether .dockerignore lets a file of the project into the build: the last rule wins."""
    parents = [path, *map(str, Path(path).parents)][:-1]
    let = True
    for rule in rules:
        if any(fnmatch.fnmatchcase(part, rule.lstrip("!")) for part in parents):
            let = rule.startswith("!")
    return let


def closure(names: set[str]) -> Iterator[metadata.Distribution]:
    """Yield the installed packages of these names, and all that they need."""
    waiting, seen = sorted(names), set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        package = metadata.distribution(name)
        yield package
        for need in map(Requirement, package.requires or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
            waiting += _extras(need)


def _extras(need: Requirement) -> list[str]:
    """Return the packages that the extras of a requirement ask for."""
    if not need.extras or (need.marker and not need.marker.evaluate({"extra": ""})):
        return []
    needs = map(Requirement, metadata.requires(need.name) or [])
    return [
        n.name
        for n in needs
        if n.marker and any(n.marker.evaluate({"extra": extra}) for extra in need.extras)
    ]


@pytest.fixture(scope="module")
def image(root: Path) -> Image:
    return read_dockerfile(root / "Dockerfile")


def test_recipe(image: Image, root: Path) -> None:
    assert re.fullmatch(rf"python:{PYTHON}-slim-\w+", image.base)  # a version, not `latest`
    (run,) = image.runs
    for flag in ("--require-hashes", "--only-binary :all:", "--no-cache-dir"):
        assert flag in run
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.user)  # by number: no passwd file is needed
    assert image.command == ["python3", f"{image.folder}/inference.py", "--input", DATA]
    assert not (root / ".docker").is_symlink()


def test_only_what_is_copied_reaches_the_builder(image: Image, root: Path) -> None:
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line]
    rules = [line for line in rules if not line.startswith("#")]
    files = subprocess.check_output(["git", "ls-files"], cwd=root, text=True).splitlines()
    files += ["model.pt", ".env", "data/EMNIST/raw/x", ".git/config", ".venv/bin/python"]
    copied = {source for sources, _ in image.copies for source in sources}
    assert {path for path in files if reaches_builder(path, rules)} == copied | set(LOCKS)
    assert copied == {*SCRIPTS, "model.pt"}


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_what_inference_imports(lock: str, root: Path) -> None:
    packages = read_lock(root / lock)
    imported = set()
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((root / script).read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {Path(script).stem for script in SCRIPTS}
    assert {IMPORTED_AS.get(name, name) for name in foreign} == {"torch", "numpy", "pillow", "tqdm"}

    lines = (root / "requirements.txt").read_text().splitlines()
    floors = [Requirement(line.split("#")[0]) for line in lines if not line.startswith("#")]
    for need in floors:
        if need.name in {IMPORTED_AS.get(name, name) for name in foreign}:
            assert packages[need.name] in need.specifier, need


def test_lock_of_the_cpu_image_can_be_installed(root: Path, tmp_path: Path) -> None:
    """Fetch every wheel of the lock and compare its hash, as the build does."""
    lock = root / LOCKS[0]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += [
        "--target",
        str(tmp_path),
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
    ]
    command += ["--python-version", PYTHON, "--platform", "manylinux_2_28_x86_64"]
    command += ["--retries", "0", "--timeout", "10", "--requirement", str(lock)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if re.search(r"satisfies the requirement torch==\S*\+cpu", run.stderr):
        pytest.skip("torch's wheels for CPUs can't be reached from here")
    assert run.returncode == 0, run.stderr
    names = run.stdout.strip().splitlines()[-1].removeprefix("Would install ").split()
    assert len(names) == len(read_lock(lock))


@pytest.fixture(scope="module")
def container(image: Image, root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lay out the image's root folder; return the command that runs a command in it."""
    if os.geteuid() or not all(map(shutil.which, CONTAINER_TOOLS)):
        pytest.skip(f"needs root and {', '.join(CONTAINER_TOOLS)}")
    unshare = ["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no name spaces of one's own")
    if not (root / "model.pt").exists():
        pytest.skip("model.pt is not there yet")

    place = tmp_path_factory.mktemp("image")
    place.chmod(0o755)
    for folder in ("etc", "proc", "dev", "tmp", "packages", DATA.strip("/")):
        (place / folder).mkdir(parents=True)
    for sources, _ in image.copies:
        for source in sources:
            target = place / image.folder.strip("/") / source
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(root / source, target)
            target.chmod(0o444)
    shown = _lay_out_python(place)
    shown[str(root / "tests" / "samples")] = DATA
    (place / "etc" / "shown").write_text("".join(f"{a}:{b}\n" for a, b in shown.items()))

    variables = [f"{name}={value}" for name, value in image.environment.items()]
    path = "PATH=/usr/local/bin:/usr/bin:/bin"
    start = [*unshare, "bash", "-c", SANDBOX, "sandbox", str(place), image.user]
    return [*start, f"--chdir={image.folder}", path, "PYTHONPATH=/packages", *variables]


def _lay_out_python(place: Path) -> dict[str, str]:
    """Put the packages of the image in its root folder; return what of this machine it shows.

    The system and the interpreter are this machine's, as no base image can be fetched; the folder
    /packages holds links to the packages that inference needs, and no other.
    """
    shown = {"/usr": "/usr", sys.base_prefix: sys.base_prefix, sys.prefix: sys.prefix}
    for name in ("bin", "lib", "lib64", "sbin"):
        path = Path("/", name)
        if path.is_symlink():
            (place / name).symlink_to(path.readlink())
        elif path.is_dir():
            shown[str(path)] = str(path)
    shutil.copyfile("/etc/ld.so.cache", place / "etc" / "ld.so.cache")
    for package in closure({"torch", "numpy", "pillow", "tqdm"}):
        for part in {Path(str(file)).parts[0] for file in package.files} - {"..", "__pycache__"}:
            link = place / "packages" / part
            if not link.is_symlink():
                link.symlink_to(package.locate_file(part))
    return {a: b for a, b in shown.items() if a == "/usr" or not Path(a).is_relative_to("/usr")}


def _run(container: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    interpreter = os.path.realpath(sys.executable)
    command = [*container, interpreter, "-S", *arguments]  # -S: of packages, only /packages
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_sandbox_is_as_closed_as_the_container(container: list[str], image: Image) -> None:
    run = _run(container, ["-c", PROBE])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found == {
        "user": [int(part) for part in image.user.split(":")],
        "groups": [],
        "capabilities": [0],
        "networks": ["lo"],
        "connection": "ENETUNREACH",
        "writable": ["/dev/shm"],
    }


def test_image_classifies_the_folder(container: list[str], image: Image, root: Path) -> None:
    run = _run(container, image.command[1:])
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    names = sorted(path.name for path in (root / "tests" / "samples").iterdir())
    assert [line[5:] for line in lines] == [f"{DATA}/{name}" for name in names]
    right = sum(chr(int(line[:3])) == name[0] for line, name in zip(lines, names, strict=True))
    assert right > len(names) / 2  # test_samples.py holds the accuracy
    assert "Traceback" not in run.stderr
