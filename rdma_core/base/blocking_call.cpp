#include "rdma_core/base/blocking_call.hpp"

#include <pthread.h>

#include "rdma_core/base/sys.hpp"

namespace rdma::sys {

long blocking_call(long number, long a, long b, long c, long d, long e, long f) {
  int was = PTHREAD_CANCEL_DEFERRED;
  pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &was);
  const long result = call(number, a, b, c, d, e, f);
  pthread_setcanceltype(was, nullptr);
  return result;
}

}  // namespace rdma::sys
