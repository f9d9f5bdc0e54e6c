#!/usr/bin/env bash
# The servers that serving.py and serving_bursts.py compare with, each in its own environment: [FOLDER] [PEER ...]
# A peer that can't be installed here is named, and the comparison goes on without it.
set -uo pipefail
folder="${1:-$(python -c 'from nearfar.bench.random_model import default_folder; print(default_folder() / "serving_envs")')}"
shift || true
peers=("${@:-openvino llama_cpp llama_server transformers vllm}")
mkdir -p "$folder"

install() { # install PEER PACKAGES...
  local peer="$1" python="$folder/$1/bin/python"
  shift
  [ -x "$python" ] || python3 -m venv "$folder/$peer"
  echo "=== $peer: $*"
  if ! "$python" -m pip install --quiet --disable-pip-version-check "$@"; then
    echo "without $peer: pip could not install it" >&2
    rm -rf "${folder:?}/$peer"
  fi
}

for peer in ${peers[*]}; do
  case "$peer" in
    openvino) install openvino openvino-genai numpy ;;
    llama_cpp) CMAKE_ARGS="-DLLAVA_BUILD=OFF" install llama_cpp llama-cpp-python numpy ;;
    llama_server) install llama_server xllamacpp ;; # llama.cpp's server as a library, built for AVX2
    transformers) install transformers torch safetensors ;;
    # The CPU build of vLLM is a wheel of its own version; where there is none, pip says so.
    vllm) install vllm "vllm[cpu]" ;;
    *) echo "unknown peer $peer: expected openvino, llama_cpp, llama_server, transformers or vllm" >&2; exit 2 ;;
  esac
done
