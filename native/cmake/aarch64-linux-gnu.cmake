# Cross-compiles for 64-bit ARM Linux with Debian's g++-aarch64-linux-gnu and runs what it built under qemu-user:
#   cmake -S native -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=native/cmake/aarch64-linux-gnu.cmake -DNEARFAR_TESTS=ON
# -DNEARFAR_QEMU_CPU=cortex-a53 (no dotprod), cortex-a76 (dotprod) or max (i8mm) is the CPU that ctest plays.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(NEARFAR_QEMU_CPU max CACHE STRING "the CPU that qemu-aarch64 plays when ctest runs the tests")
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu ${NEARFAR_QEMU_CPU})
