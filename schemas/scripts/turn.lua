-- Slots of a roll-out: who may change its policy now, so that enough hosts go on serving.
-- KEYS[1] runs; ARGV: 'release' and a worker; 'renew', a worker and ms; or 'take', a worker, ms, the hosts that must go on
--   serving ('' for three quarters of those there are, rounded down, and all but one of a few), then the names of the
--   workers that have a heartbeat.
-- A slot is a member of the sorted set `rollout`, scored by the end of its lease; one whose lease is over is free. A worker
-- that has a slot gets it again: the answer before may have been lost, or the worker restarted in its change.
-- A host goes on serving when its heartbeat says `serving`, it has no slot and is not the caller. Whoever has a slot counts
-- as there, heartbeat or none: after an outage the heartbeats are gone, and not the hosts.
-- `take` returns {1 when the caller has a slot, others that go on serving, those that must}; the others return 1 when the
-- worker had one.
local action, worker, lease, least = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local slots = key('rollout')

if action == 'release' then return try('ZREM', slots, worker) or 0 end
if action == 'renew' then
  if not try('ZSCORE', slots, worker) then return 0 end
  redis.call('ZADD', slots, now_ms() + lease, worker)
  return 1
end

local now = now_ms()
try('ZREMRANGEBYSCORE', slots, '-inf', now)
local changing, mine = {}, try('ZSCORE', slots, worker)
for _, name in ipairs(try('ZRANGE', slots, 0, -1) or {}) do changing[name] = true end

-- All that serve or change, by name; and of these the ones that go on serving whatever the caller does.
local there, live, serving = {[worker] = true}, 1, 0
local function count(name)
  if not there[name] then there[name], live = true, live + 1 end
end
for name in pairs(changing) do count(name) end
for at = 5, #ARGV do
  local name = ARGV[at]
  local state = try('HGET', key('workers', name), 'state')
  if state == 'serving' or state == 'changing' then
    if state == 'serving' and not there[name] then serving = serving + 1 end
    count(name)
  end
end

local floor = tonumber(least) or live - math.max(1, math.ceil(live / 4))
-- Unknown (no heartbeat): it may be serving.
local state = try('HGET', key('workers', worker), 'state') or 'serving'
local granted = mine or state ~= 'serving' or serving >= floor
if granted then write('ZADD', slots, now + lease, worker) end
return {granted and 1 or 0, serving, floor}
