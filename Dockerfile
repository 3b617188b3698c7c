# The server as an image: docker build -t perft-serve .
#   docker run -p 8000:8000 -v "$PWD/.cache/smolmixtral:/models/base:ro" -v "$PWD/demo/adapters:/adapters:ro" \
#     perft-serve --model /models/base --adapter-dir /adapters
# On a GPU machine add `--gpus all`; PyPI's torch for Linux carries CUDA. For a smaller image on a CPU, build with
# `--build-arg PIP_EXTRA_INDEX_URL=...` naming PyTorch's index of CPU builds.

FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.11-slim
ARG PIP_EXTRA_INDEX_URL=
ENV PYTHONUNBUFFERED=1
COPY constraints.txt /dist/
COPY --from=build /dist/*.whl /dist/
RUN pip install --no-cache-dir --constraint /dist/constraints.txt torch \
    && pip install --no-cache-dir --constraint /dist/constraints.txt /dist/*.whl \
    && rm -r /dist
RUN useradd --create-home --uid 1000 perft
USER perft
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["perft-serve", "serve", "--host", "0.0.0.0", "--port", "8000"]
