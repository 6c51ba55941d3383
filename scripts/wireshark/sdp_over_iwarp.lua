-- SDP over iWARP in Wireshark and tshark: hands RDMAP Sends to Wireshark's own SDP dissector, which by itself looks at InfiniBand
-- and RoCE only.
--
--   tshark -2 -X lua_script:sdp_over_iwarp.lua --disable-heuristic rpcrdma_iwarp --disable-heuristic smb_direct_iwarp -r FILE
--
-- Wireshark loads it from its personal Lua plugin folder (Help, About, Folders); there the two heuristics are under Analyze,
-- Enabled Protocols. They are asked before this one, and take some messages for theirs.
--
-- The capture must hold the start of the connection: Wireshark knows iWARP by its MPA frames. A message longer than one DDP segment
-- is decoded at its first; the others are shown as data.

-- Of several segments in one packet Wireshark 4.0 puts together the wrong ones.
set_preference("iwarp_ddp_rdmap.reassemble_iwarp_rdma_send", false)

local SEND, SEND_SE_INVALIDATE = 3, 6 -- the opcodes of Sends; all others carry no SDP header
local BASE_HEADER = 16

local sdp = Dissector.get("infiniband_sdp")
local opcode, offset = Field.new("iwarp_rdma.opcode"), Field.new("iwarp_ddp.mo")

-- A packet may hold several segments: what the field says of the one that is being dissected.
local function last(field)
  local all = { field() }
  return all[#all].value
end

local function starts_message(tvb)
  local op = last(opcode)
  return op >= SEND and op <= SEND_SE_INVALIDATE and last(offset) == 0 and tvb:len() >= BASE_HEADER
end

local shim = Proto("sdp_over_iwarp", "SDP over iWARP")

shim:register_heuristic("iwarp_ddp_rdmap", function(tvb, pinfo, tree)
  if not starts_message(tvb) then return false end
  sdp:call(tvb, pinfo, tree)
  return true
end)
