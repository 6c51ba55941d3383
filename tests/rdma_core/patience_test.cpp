#include "rdma_core/cm/patience.hpp"

#include <boost/test/unit_test.hpp>

namespace rdma::cm {

constexpr Nanos kMillisecond = 1'000'000;

BOOST_AUTO_TEST_CASE(who_hears_nothing_waits_as_long_as_was_asked) {
  const Patience lonely = Patience::of(30, 1000);
  BOOST_TEST(!lonely.is_over(1000));
  BOOST_TEST(!lonely.is_over(1000 + 30 * kMillisecond - 1));
  BOOST_TEST(lonely.is_over(1000 + 30 * kMillisecond));
}

BOOST_AUTO_TEST_CASE(who_hears_of_the_peer_waits_on_but_not_for_ever) {
  Patience p = Patience::of(30, 0);
  Nanos now = 0;
  for (; !p.is_over(now); now += 20 * kMillisecond) p.renew(now);
  BOOST_TEST(now >= Patience::kMost * 30 * kMillisecond);
  BOOST_TEST(now <= Patience::kMost * 30 * kMillisecond + 20 * kMillisecond);
  Patience silent = Patience::of(30, 0);
  silent.renew(20 * kMillisecond);
  BOOST_TEST(!silent.is_over(50 * kMillisecond - 1));
  BOOST_TEST(silent.is_over(50 * kMillisecond), "the last word counts");
}

}  // namespace rdma::cm
