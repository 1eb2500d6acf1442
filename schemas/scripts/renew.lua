-- Renew leases, fenced: only entries this consumer still holds.
-- KEYS[1] jobs:RUN:LANE; ARGV: consumer, entry ids.
-- A plain XCLAIM would take an entry back from the host that reclaimed it.
-- Returns the entry ids that are lost.
local mine, lost = {}, {}
for at = 2, #ARGV do
  local pending = redis.pcall('XPENDING', KEYS[1], 'workers', ARGV[at], ARGV[at], 1, ARGV[1])
  if not pending.err and #pending == 1 then mine[#mine + 1] = ARGV[at] else lost[#lost + 1] = ARGV[at] end
end
-- 1,000 at a time: Lua's unpack is bounded by its C stack.
for first = 1, #mine, 1000 do
  local ids = {unpack(mine, first, math.min(first + 999, #mine))}
  ids[#ids + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], 'workers', ARGV[1], 0, unpack(ids))
end
return lost
