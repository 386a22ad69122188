# Names the characters in a folder of pictures, offline; for x86-64 and ARM:
#
#   docker build --tag characters .                        # --build-arg WHEELS=cuda for a GPU
#   docker run --rm --network none --read-only --cap-drop ALL \
#       -v "$PWD/tests/samples:/test/data:ro" characters   # --gpus all
#
# .docker/cpu.lock and .docker/cuda.lock hold every package by version and hash.

FROM python:3.11-slim-bookworm

ARG WHEELS=cpu
# The interpreter stays without pip: nothing is installed later.
RUN --mount=type=bind,source=.docker,target=/locks \
    python3 -m pip install --no-cache-dir --only-binary :all: --require-hashes \
        --requirement "/locks/${WHEELS}.lock" \
    && python3 -m pip uninstall --yes pip

WORKDIR /app
COPY --chmod=0444 CNN.py picture.py inference.py report.html model.pt ./

ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["python3", "/app/inference.py"]
CMD ["--input", "/test/data"]
