#include "rdma_core/drivers/shm/shm_links.hpp"

#include <algorithm>
#include <new>

#include "rdma_core/base/sys.hpp"

namespace rdma::shm {

void ShmLink::try_to_read(const ProcessId& myself) noexcept {
  // The kernel would let root read anybody; but whose memory that is, the overflow uid and a foreign namespace do not say.
  const bool is_own_user = peer.uid == peer.own_euid && peer.pid != 0;
  reader.try_peer(is_own_user ? peer.pid : 0, {nonce, myself}, *at<ProgramWindow>(peer_base() + kWindowOffset));
}

ShmLink::~ShmLink() {
  if (socket >= 0) sys::call(SYS_close, socket);
}

std::shared_ptr<ShmLink> ShmLinks::find(std::uint64_t id) const {
  const std::lock_guard lock(mutex_);
  for (const auto& link : links_)
    if (link->id == id) return link;
  return nullptr;
}

void ShmLinks::add(const std::shared_ptr<ShmLink>& link) {
  const std::lock_guard lock(mutex_);
  link->id = next_id_++;
  links_.push_back(link);
}

void ShmLinks::drop(std::uint64_t id) noexcept {
  std::shared_ptr<ShmLink> last;  // dies after the lock is given back
  const std::lock_guard lock(mutex_);
  const auto it = std::find_if(links_.begin(), links_.end(), [id](const auto& link) { return link->id == id; });
  if (it == links_.end()) return;
  last = std::move(*it);
  links_.erase(it);
}

std::vector<std::shared_ptr<ShmLink>> ShmLinks::all() const {
  const std::lock_guard lock(mutex_);
  return links_;
}

std::size_t ShmLinks::count_uid(std::uint32_t uid) const noexcept {
  const std::lock_guard lock(mutex_);
  return static_cast<std::size_t>(
      std::count_if(links_.begin(), links_.end(), [uid](const auto& link) { return !link->self && link->peer.uid == uid; }));
}

void ShmLinks::abandon_in_child() noexcept {
  // Another thread may have held the lock when the process forked; it does not exist here.
  new (&mutex_) std::mutex;
  for (const auto& link : links_) {
    link->alive.store(false, std::memory_order_relaxed);
    if (link->socket >= 0) sys::call(SYS_close, link->socket);
    link->socket = -1;
  }
  links_.clear();
}

}  // namespace rdma::shm
