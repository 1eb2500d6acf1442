-- End the open jobs of batches whose deadline is over, as `expired`.
-- KEYS[1] runs; ARGV: grace in ms, in which hosts settle by themselves what they have; entries looked at by one call, at
--   most.
-- Returns {jobs ended, 1 when there may be more to do at once}.
local grace, most = tonumber(ARGV[1]), tonumber(ARGV[2])
-- Batches looked at by one call, at most.
local BATCHES = 100
local ended, looked = 0, 0

local due = try('ZRANGEBYSCORE', key('deadlines'), '-inf', now_ms() - grace, 'LIMIT', 0, BATCHES) or {}
for _, member in ipairs(due) do
  local run, batch = string.match(member, '^([^:]+):([^:]+)$')
  local states = run and key('batches', run, batch)
  local facts = states and try('HMGET', states, 'size', 'expired_to', 'parts') or {}
  local size, from, parts = tonumber(facts[1]) or 0, tonumber(facts[2]) or 0, number(facts[3], 1, AT_ONCE, 1)
  local upto = math.min(size, from + math.max(1, math.floor((most - looked) / parts)))
  if upto > from then
    local count = finish(run, batch, from, upto - 1, 'expired', 'its deadline is over')
    if count > 0 then tell_ended(run, batch) end
    ended, looked = ended + count, looked + (upto - from) * parts
  end
  if upto < size then
    redis.call('HSET', states, 'expired_to', upto)
    return {ended, 1}
  end
  redis.call('ZREM', key('deadlines'), member)
  if looked >= most then return {ended, 1} end
end
return {ended, #due == BATCHES and 1 or 0}
