#include "rdma_core/base/result.hpp"

#include <errno.h>

#include <boost/test/unit_test.hpp>
#include <memory>
#include <string>

namespace rdma {
namespace {

Result<int> half(int n) {
  if (n % 2 != 0) return fail(EINVAL, "odd");
  return n / 2;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_value_is_true_and_readable) {
  Result<int> r = half(8);
  BOOST_REQUIRE(r.ok());
  BOOST_TEST(static_cast<bool>(r));
  BOOST_TEST(*r == 4);
  *r = 5;
  BOOST_TEST(r.value() == 5);
}

BOOST_AUTO_TEST_CASE(an_error_is_false_and_says_why) {
  const Result<int> r = half(7);
  BOOST_REQUIRE(!r.ok());
  BOOST_TEST(!static_cast<bool>(r));
  BOOST_TEST(r.error().code == EINVAL);
  BOOST_TEST(r.error().what == std::string("odd"));
}

BOOST_AUTO_TEST_CASE(errors_compare_by_code) {
  BOOST_TEST((Error{EINVAL, "a"} == Error{EINVAL, "b"}));
  BOOST_TEST(!(Error{EINVAL, "a"} == Error{ENOMEM, "a"}));
}

BOOST_AUTO_TEST_CASE(a_value_that_only_moves_moves_out) {
  Result<std::unique_ptr<int>> r(std::make_unique<int>(3));
  std::unique_ptr<int> taken = std::move(*r);
  BOOST_TEST(*taken == 3);
  BOOST_TEST((*r == nullptr));
}

BOOST_AUTO_TEST_CASE(unit_and_own_error_types_work) {
  enum class Why { because };
  const Result<Unit, Why> bad(Err{Why::because});
  BOOST_TEST((bad.error() == Why::because));
  const Result<Unit, Why> good(Unit{});
  BOOST_TEST(good.ok());
}

}  // namespace rdma
