# Names the characters in a folder of pictures, offline:
#
#   docker build --tag characters .                        # --build-arg WHEELS=cuda for a GPU
#   docker run --rm --network none --read-only --cap-drop ALL \
#       -v "$PWD/tests/samples:/test/data:ro" characters   # --gpus all
#
# .docker/cpu.lock and .docker/cuda.lock hold every package by version and hash, for x86-64.

FROM python:3.11-slim-bookworm

ARG WHEELS=cpu
# The interpreter stays without pip: nothing is installed later.
RUN --mount=type=bind,source=.docker,target=/locks \
    python3 -m pip install --no-cache-dir --only-binary :all: --require-hashes \
        --requirement "/locks/${WHEELS}.lock" \
    && python3 -m pip uninstall --yes pip

WORKDIR /app
COPY --chmod=0444 CNN.py inference.py model.pt ./

# The workers' socket needs a folder; with --read-only only /dev/shm can be written to.
ENV PYTHONDONTWRITEBYTECODE=1 TMPDIR=/dev/shm
USER 10001:10001
ENTRYPOINT ["python3", "/app/inference.py"]
CMD ["--input", "/test/data"]
