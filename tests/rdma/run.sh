#!/usr/bin/env bash
# run.sh PYTHON [pytest's arguments]: the tests of this folder in the guest of vm/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$1
shift
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "make test-rdma needs root and Debian's packages: qemu-system-x86, busybox-static, cpio, kmod," >&2
  echo "ibverbs-utils, ibverbs-providers and a kernel that is unpacked, not installed (see tests/rdma/README.md)." >&2
  exit 2
fi
echo "== NIXL over RDMA verbs (Soft-RoCE) in a virtual machine, its CPU emulated: about 10 minutes"
tests/rdma/vm/setup.sh
# The kernels are compiled here, for a CPU that the guest has too: it loads them in seconds.
export NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=
PYTHONPATH=$PWD "$python" -c 'from transfer.warming import warm_up; warm_up()'
RDMA_VM_SMP=${RDMA_VM_SMP:-2} RDMA_VM_NICE=${RDMA_VM_NICE:-0} tests/rdma/vm/run.sh -t "${RDMA_VM_SECONDS:-1200}" \
  -e "PYTHONPATH=$PWD" -e NUMBA_CPU_NAME=generic -e NUMBA_CPU_FEATURES= -- \
  tests/rdma/vm/with_verbs "$python" -m pytest -p no:cacheprovider tests/rdma "$@"
