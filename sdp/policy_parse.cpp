// The parser follows libsdp's scanner where it is odd: keywords need no blank around them ("usebothserver" is three), numbers have
// no leading zeros, the run of characters after a role or after "file" is a name whatever it looks like, and every statement ends
// with a newline.
#include <arpa/inet.h>

#include <algorithm>
#include <cstring>

#include "sdp/policy.hpp"

namespace sdp {
namespace {

constexpr const char* kRuleForm = "write: use <tcp|sdp|both> <server|client> <program> <address>:<port>";
constexpr const char* kPortForm = "write *, a port, or a range such as 8000-8080";
constexpr const char* kV4Form = "write *, a.b.c.d, a.b.c.d/prefix, or an IPv6 address as [addr] or addr/prefix";
constexpr const char* kV6Form = "write it as [2001:db8::1]:port, [2001:db8::]/32:port or 2001:db8::/32:port";

bool is_blank(char c) noexcept { return c == ' ' || c == '\t'; }
bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }

class Parser {
 public:
  Parser(std::string_view text, const char* filename) noexcept : text_(text), file_(filename) {}

  rdma::Result<PolicyRules, PolicyError> run() {
    while (!failed_ && pos_ < text_.size()) line();
    if (!failed_) return std::move(rules_);
    error_.file = file_;
    error_.log = std::move(rules_.log);
    return rdma::Err{std::move(error_)};
  }

 private:
  // --- statements

  void line() {
    skip_blanks();
    if (at_end() || take_newline()) return;
    if (keyword("log"))
      log_statement();
    else if (keyword("use"))
      use_statement();
    else
      return fail("\"use\", \"log\" or a comment", kRuleForm);
    if (failed_) return;
    skip_blanks();
    if (take_newline()) return;
    if (at_end()) return fail("a newline", "end the last line with a newline too");
    fail("the end of the line", "one statement a line; a comment begins with #");
  }

  void log_statement() {
    for (;;) {
      skip_blanks();
      if (keyword("destination")) {
        log_destination();
      } else if (keyword("min-level")) {
        skip_blanks();
        std::uint32_t level = 0;
        if (!number(level, UINT32_MAX)) return fail("a number after \"min-level\"", "from 1 (everything) to 9 (errors only)");
        rules_.log.has_level = true;
        rules_.log.min_level = level;
      } else {
        return;
      }
      if (failed_) return;
    }
  }

  void log_destination() {
    using Destination = LogStatements::Destination;
    skip_blanks();
    if (keyword("stderr")) {
      rules_.log.destination = Destination::standard_error;
    } else if (keyword("syslog")) {
      rules_.log.destination = Destination::syslog;
    } else if (keyword("file")) {
      std::string name;
      if (!take_name(name)) return fail("the name of a file", "write: log destination file NAME");
      rules_.log.destination = Destination::file;
      rules_.log.file = std::move(name);
    } else {
      fail("\"stderr\", \"syslog\" or \"file\"", "write: log destination <stderr|syslog|file NAME>");
    }
  }

  void use_statement() {
    PolicyRule rule;
    rule.line = line_;
    skip_blanks();
    if (keyword("tcp"))
      rule.family = Family::tcp;
    else if (keyword("sdp"))
      rule.family = Family::sdp;
    else if (keyword("both"))
      rule.family = Family::both;
    else
      return fail("\"tcp\", \"sdp\" or \"both\"", kRuleForm);

    skip_blanks();
    bool is_server = true;
    if (keyword("client") || keyword("connect"))
      is_server = false;
    else if (!keyword("server") && !keyword("listen"))
      return fail("\"server\" or \"client\"", kRuleForm);

    if (!take_name(rule.program)) return fail("the name of a program, or *", kRuleForm);
    skip_blanks();
    network(rule.network);
    if (failed_) return;
    skip_blanks();
    if (!take(':')) return fail("\":\" and a port after the address", kPortForm);
    ports(rule);
    if (failed_) return;
    (is_server ? rules_.server : rules_.client).push_back(std::move(rule));
  }

  void ports(PolicyRule& rule) {
    skip_blanks();
    if (take('*')) return;
    std::uint32_t first = 0;
    if (!number(first, 65535)) return fail("a port from 0 to 65535, or *", kPortForm);
    std::uint32_t last = first;
    skip_blanks();
    if (take('-')) {
      skip_blanks();
      const std::size_t at = pos_;
      if (!number(last, 65535)) return fail("the last port of the range", kPortForm);
      if (last < first) {
        pos_ = at;
        return fail("a last port that is not below the first", "write the lower port first");
      }
    }
    rule.first_port = static_cast<std::uint16_t>(first);
    rule.last_port = static_cast<std::uint16_t>(last);
  }

  // --- addresses

  void network(Network& n) {
    if (take('*')) return;
    if (peek() == '[') return bracketed_v6(n);
    const std::size_t run = text_.find_first_not_of("0123456789abcdefABCDEF:.", pos_);
    const std::string_view word = text_.substr(pos_, run == std::string_view::npos ? run : run - pos_);
    if (std::count(word.begin(), word.end(), ':') >= 2) return prefixed_v6(n, word);
    v4(n);
  }

  void v4(Network& n) {
    n.kind = Network::Kind::v4;
    for (int i = 0; i < 4; ++i) {
      skip_blanks();
      if (i != 0 && !take('.')) return fail("\".\" between the numbers of an IPv4 address", kV4Form);
      skip_blanks();
      std::uint32_t octet = 0;
      if (!number(octet, 255)) return fail(i == 0 ? "an address or *" : "a number from 0 to 255", kV4Form);
      n.address[i] = static_cast<std::uint8_t>(octet);
    }
    prefix(n, 32);
  }

  void bracketed_v6(Network& n) {
    const std::size_t close = text_.find_first_of("]\n", pos_);
    if (close == std::string_view::npos || text_[close] != ']') return fail("\"]\" after an IPv6 address", kV6Form);
    if (!v6(n, text_.substr(pos_ + 1, close - pos_ - 1))) return fail("an IPv6 address in brackets", kV6Form);
    pos_ = close + 1;
    prefix(n, 128);
    fold_mapped(n);
  }

  /// Without brackets only the prefix tells where the address ends and the port begins.
  void prefixed_v6(Network& n, std::string_view word) {
    const std::size_t end = pos_ + word.size();
    if (end >= text_.size() || text_[end] != '/') return fail("brackets or a prefix with an IPv6 address", kV6Form);
    if (!v6(n, word)) return fail("an IPv6 address", kV6Form);
    pos_ = end;
    prefix(n, 128);
    fold_mapped(n);
  }

  static bool v6(Network& n, std::string_view word) {
    char text[INET6_ADDRSTRLEN];
    if (word.size() >= sizeof text || word.find('\0') != std::string_view::npos) return false;
    text[word.copy(text, word.size())] = '\0';
    n.kind = Network::Kind::v6;
    return inet_pton(AF_INET6, text, n.address) == 1;
  }

  void prefix(Network& n, std::uint32_t longest) {
    n.prefix = static_cast<std::uint8_t>(longest);
    skip_blanks();
    if (!take('/')) return;
    skip_blanks();
    std::uint32_t bits = 0;
    if (number(bits, longest))
      n.prefix = static_cast<std::uint8_t>(bits);
    else
      fail(longest == 32 ? "a prefix length from 0 to 32" : "a prefix length from 0 to 128",
           "such as 192.0.2.0/24 or 2001:db8::/32");
  }

  /// Connections whose IPv6 address holds an IPv4 one are matched as IPv4, so a rule for them must be, too.
  void fold_mapped(Network& n) const noexcept {
    static constexpr std::uint8_t kMapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    if (failed_ || n.prefix < 96 || std::memcmp(n.address, kMapped, sizeof kMapped) != 0) return;
    n.kind = Network::Kind::v4;
    n.prefix = static_cast<std::uint8_t>(n.prefix - 96);
    std::memmove(n.address, n.address + 12, 4);
    std::memset(n.address + 4, 0, 12);
  }

  // --- tokens

  bool at_end() const noexcept { return pos_ == text_.size(); }
  char peek() const noexcept { return at_end() ? '\0' : text_[pos_]; }

  bool take(char c) noexcept {
    if (at_end() || text_[pos_] != c) return false;
    ++pos_;
    return true;
  }

  bool take_newline() noexcept {
    if (!take('\n')) return false;
    ++line_;
    line_start_ = pos_;
    return true;
  }

  /// Blanks, and a comment up to its newline.
  void skip_blanks() noexcept {
    while (!at_end() && is_blank(text_[pos_])) ++pos_;
    if (peek() == '#') pos_ = std::min(text_.find('\n', pos_), text_.size());
  }

  bool keyword(std::string_view word) noexcept {
    if (!text_.substr(pos_).starts_with(word)) return false;
    pos_ += word.size();
    return true;
  }

  /// False (and nothing is taken) when there is no number or it is above `most`.
  bool number(std::uint32_t& value, std::uint32_t most) noexcept {
    std::size_t p = pos_;
    std::uint64_t n = 0;
    while (p < text_.size() && is_digit(text_[p])) {
      n = n * 10 + static_cast<std::uint64_t>(text_[p++] - '0');
      if (n > most) return false;
      if (n == 0) break;
    }
    if (p == pos_) return false;
    value = static_cast<std::uint32_t>(n);
    pos_ = p;
    return true;
  }

  bool take_name(std::string& name) {
    while (!at_end() && is_blank(text_[pos_])) ++pos_;
    const std::size_t end = std::min(text_.find_first_of(" \t\n", pos_), text_.size());
    const std::string_view run = text_.substr(pos_, end - pos_);
    if (run.empty() || run.size() > 1023 || run.find('\0') != std::string_view::npos) return false;
    name = run;
    pos_ = end;
    return true;
  }

  // --- mistakes

  std::string found() const {
    if (at_end()) return "the end of the file";
    const char c = text_[pos_];
    if (c == '\n') return "the end of the line";
    if (c == '\0') return "a NUL byte (is this a text file?)";
    if (c == '\r') return "a carriage return (convert the file to Unix line ends)";
    std::string run = "\"";
    for (std::size_t p = pos_; p < text_.size() && !is_blank(text_[p]) && text_[p] != '\n'; ++p) {
      if (run.size() > 24) {
        run += "…";
        break;
      }
      run += text_[p] >= ' ' && text_[p] <= '~' ? text_[p] : '?';
    }
    return run + "\"";
  }

  void fail(const char* expected, const char* advice) {
    if (failed_) return;
    failed_ = true;
    error_.line = line_;
    error_.column = static_cast<std::uint32_t>(pos_ - line_start_ + 1);
    error_.what = std::string("expected ") + expected + ", found " + found() + "; " + advice;
  }

  std::string_view text_;
  const char* file_;
  std::size_t pos_ = 0, line_start_ = 0;
  std::uint32_t line_ = 1;
  bool failed_ = false;
  PolicyRules rules_;
  PolicyError error_;
};

}  // namespace

std::string to_string(const PolicyError& error) {
  std::string text = error.file;
  if (error.line != 0) text += ":" + std::to_string(error.line) + ":" + std::to_string(error.column);
  return text + ": " + error.what;
}

rdma::Result<PolicyRules, PolicyError> parse_policy(std::string_view text, const char* filename) {
  return Parser(text, filename).run();
}

}  // namespace sdp
