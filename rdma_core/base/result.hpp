// Result<T, E>: a value or the error that kept it from being made.
//
// Layer: standard library only. Used at every boundary that can fail for a reason the caller must handle;
// programmer mistakes assert, full queues are a status of their own (see device.hpp, Post).
#pragma once

#include <cassert>
#include <type_traits>
#include <utility>
#include <variant>

namespace rdma {

struct Unit {
  friend bool operator==(Unit, Unit) = default;
};

/// An error of this library: the errno that says what kind, and a static text that says where.
/// `what` always points at a string literal, so an Error is copied freely and never owns memory.
struct Error {
  int code = 0;
  const char* what = "";
  friend bool operator==(const Error& a, const Error& b) { return a.code == b.code; }
};

template <class E>
struct Err {
  E error;
};
template <class E>
Err(E) -> Err<E>;

/// Makes the error alternative: `return fail(EINVAL, "qp: bad state");`
inline Err<Error> fail(int code, const char* what) noexcept { return Err<Error>{Error{code, what}}; }

template <class T, class E = Error>
class [[nodiscard]] Result {
  static_assert(!std::is_same_v<T, E>);

 public:
  Result(T value) noexcept(std::is_nothrow_move_constructible_v<T>) : v_(std::in_place_index<0>, std::move(value)) {}
  Result(Err<E> error) noexcept : v_(std::in_place_index<1>, std::move(error.error)) {}

  explicit operator bool() const noexcept { return v_.index() == 0; }
  bool ok() const noexcept { return v_.index() == 0; }

  T& value() & noexcept { return *get(); }
  const T& value() const& noexcept { return *std::get_if<0>(&v_); }
  T&& value() && noexcept { return std::move(*get()); }
  T& operator*() & noexcept { return *get(); }
  T&& operator*() && noexcept { return std::move(*get()); }
  T* operator->() noexcept { return get(); }

  const E& error() const noexcept {
    assert(!ok());
    return *std::get_if<1>(&v_);
  }

 private:
  T* get() noexcept {
    assert(ok());
    return std::get_if<0>(&v_);
  }
  std::variant<T, E> v_;
};

}  // namespace rdma
