# docker build -t cdistill .                                       CPU
# docker build -t cdistill --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .   CUDA 13
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.11-slim
# libgomp: the C++ module's threads; gcc: Triton compiles its launchers when a kernel first runs.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
COPY --from=build /dist /tmp/dist
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch -c /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt /tmp/dist/*.whl vl-convert-python && rm -rf /tmp/dist
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["cdistill"]
CMD ["doctor"]
