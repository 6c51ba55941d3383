#include "rdma_core/drivers/verbs/verbs_queue.hpp"

#include <infiniband/verbs.h>

#include <algorithm>
#include <new>

#include "rdma_core/drivers/verbs/verbs_qp.hpp"

namespace rdma::verbs {

std::shared_ptr<SharedQueue> SharedQueue::make(ibv_context* context, std::uint32_t depth, ibv_comp_channel* channel) {
  std::shared_ptr<SharedQueue> made(new SharedQueue);
  made->depth_ = depth;
  made->cq_ = ibv_create_cq(context, static_cast<int>(depth), made.get(), channel, 0);
  return made->cq_ != nullptr ? made : nullptr;
}

SharedQueue::~SharedQueue() {
  if (cq_ != nullptr) ibv_destroy_cq(cq_);
}

void SharedQueue::enter(VerbsCq& user, std::uint32_t depth) {
  users_.push_back(&user);
  taken_ += depth;
}

void SharedQueue::leave(VerbsCq& user, std::uint32_t depth) {
  std::erase(users_, &user);
  taken_ -= depth;
}

void SharedQueue::attach(std::uint32_t qpn, VerbsCq* sends, VerbsCq* receives) {
  const Guard guard(*this);
  owners_.insert(std::ranges::lower_bound(owners_, qpn, {}, &Owner::qpn), {qpn, sends, receives});
}

void SharedQueue::detach(std::uint32_t qpn) {
  const Guard guard(*this);
  std::erase_if(owners_, [&](const Owner& each) { return each.qpn == qpn; });
}

std::uint8_t SharedQueue::announced() noexcept {
  request_.store((request_.load() / kAnnounced + 1) * kAnnounced);
  {
    const Guard guard(*this);
    collect();
  }
  std::uint8_t wakes = wake_due();
  if (std::ranges::none_of(users_, [](const VerbsCq* each) { return each->is_armed(); })) return wakes;
  request();
  {
    const Guard guard(*this);
    collect();  // what came before the request is announced by nobody
  }
  wakes |= wake_due();
  return wakes;
}

std::uint8_t SharedQueue::wake_due() noexcept {
  std::uint8_t wakes = 0;
  for (VerbsCq* each : users_) wakes |= each->wake_if_due();
  return wakes;
}

}  // namespace rdma::verbs
