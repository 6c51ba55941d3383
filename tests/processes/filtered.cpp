// Runs a program under a filter (seccomp) that answers so to one system call: filtered NUMBER ERRNO PROGRAM ARG...
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const auto number = static_cast<unsigned>(std::atoi(argv[1])), error = static_cast<unsigned>(std::atoi(argv[2]));
  sock_filter code[] = {{BPF_LD | BPF_W | BPF_ABS, 0, 0, 0},  // seccomp_data::nr
                        {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, number},
                        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | error},
                        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW}};
  const sock_fprog program{4, code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    std::perror("seccomp");
    return 77;
  }
  execv(argv[3], argv + 3);
  std::perror(argv[3]);
  return 1;
}
