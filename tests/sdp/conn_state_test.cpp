#include "sdp/conn_state.hpp"

#include <boost/test/unit_test.hpp>
#include <fstream>
#include <sstream>

using namespace sdp;

BOOST_AUTO_TEST_CASE(the_matrix_is_the_stored_one) {
  std::ostringstream now;
  for (int s = 0; s < kConnStates; ++s)
    for (int e = 0; e < kConnEvents; ++e) {
      const auto next = next_state(static_cast<ConnState>(s), static_cast<ConnEvent>(e));
      now << to_string(static_cast<ConnState>(s)) << " + " << to_string(static_cast<ConnEvent>(e)) << " = "
          << (next ? to_string(*next) : "illegal") << "\n";
    }
  std::ifstream file(TEST_DATA_DIR "/sdp/conn_state_matrix.txt");
  std::ostringstream stored;
  stored << file.rdbuf();
  BOOST_TEST(now.str() == stored.str());
}
