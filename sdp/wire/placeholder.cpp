namespace sdp {}
