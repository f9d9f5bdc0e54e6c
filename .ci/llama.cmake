# Read by the build of llama-cpp-python right after its project(): its common library, which the Python package has no
# use for, is two fifths of the work.  The build sets the cached variable; a plain one of the same name goes before it.
set(LLAMA_BUILD_COMMON OFF)
