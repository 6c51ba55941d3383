#include "rdma_core/work_request.hpp"

namespace rdma {

const char* to_string(WcStatus status) noexcept {
  switch (status) {
    case WcStatus::success:
      return "success";
    case WcStatus::local_length_error:
      return "local length error";
    case WcStatus::local_protection_error:
      return "local protection error";
    case WcStatus::remote_access_error:
      return "remote access error";
    case WcStatus::remote_invalid_request:
      return "remote invalid request";
    case WcStatus::rnr_retry_exceeded:
      return "RNR retry exceeded";
    case WcStatus::retry_exceeded:
      return "retry exceeded";
    case WcStatus::flushed:
      return "flushed";
    case WcStatus::fatal:
      return "device gone";
  }
  return "?";
}

}  // namespace rdma
