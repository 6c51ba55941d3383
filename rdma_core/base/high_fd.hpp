// Descriptors of the library's own (the log file, the table of statistics) are kept out of the way of the program's.
#pragma once

namespace rdma {

/// The descriptor to use instead of `fd` from now on, CLOEXEC: a high duplicate (`fd` is then closed), or `fd` itself when there is
/// no room above. The keeper knows of it, so that the program cannot close it.
int keep_fd(int fd) noexcept;
/// `fd`, which keep_fd() gave, is about to be closed or is somebody else's by now.
void forget_fd(int fd) noexcept;

/// Who keeps descriptors: the engine, once it runs. Until then they are only moved.
void set_fd_keeper(int (*keep)(int fd) noexcept, void (*forget)(int fd) noexcept) noexcept;

}  // namespace rdma
