-- Look for what nobody will come back to: exact jobs of versions that no host serves, and runs that ended.
-- KEYS[1] runs; ARGV: ms after which a run without open jobs and uncommitted batches is forgotten, seconds its counters are
--   kept then, jobs looked at by one call, at most; then what hosts serve or are on their way to: :VERSION of a checkpoint,
--   RUN:VERSION of an adapter.
-- An exact job is stale once a newer policy is current for its run and no host is on its version; while it is the current
-- one, or newer, a host may still come to it. Current for a run is the newer of its adapter and the checkpoint: an adapter
-- that is published from now on is newer than both.
-- Returns {jobs ended, runs forgotten}.
local idle, retention, most = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local looked = 0
-- Run -> version -> true; '' is all runs.
local served = {}
for at = 4, #ARGV do
  local run, version = string.match(ARGV[at], '^([^:]*):(%d+)$')
  served[run] = served[run] or {}
  served[run][tonumber(version)] = true
end
local told = {}

-- A name without fields in `waiting` is a tombstone, or somebody's own: it tells nothing of the job it names.
local function end_stale(set, name, version)
  local run, job = string.match(name, '^([^:]+):[^:]+:(.+)$')
  local batch, index = parse(job)
  local ended = 0
  if batch and try('HEXISTS', key('waiting'), name) == 1 then
    local reason = 'exact job for policy ' .. version .. ', which no host serves any more'
    ended = finish(run, batch, tonumber(index), tonumber(index), 'stale', reason)
    if ended > 0 then told[run .. ':' .. batch] = {run, batch} end
  end
  try('ZREM', set, name)
  return ended
end

local function is_served(run, version) return (served[run] or {})[version] or (served[''] or {})[version] end

-- Version by version, so that many jobs of one that is served hide none of another.
local function end_stale_of(run, current)
  local set, ended, after = key('exact', run), 0, '-inf'
  while looked < most do
    local old = try('ZRANGEBYSCORE', set, after, '(' .. current, 'WITHSCORES', 'LIMIT', 0, 1) or {}
    local version = old[2]
    if not version then break end
    if not is_served(run, tonumber(version)) then
      for _, name in ipairs(redis.call('ZRANGEBYSCORE', set, version, version, 'LIMIT', 0, most - looked)) do
        ended, looked = ended + end_stale(set, name, version), looked + 1
      end
    end
    after = '(' .. version
  end
  return ended
end

local function version_in(name) return number(try('GET', name), 0, 1e15, nil) end

local function end_all_stale()
  local ended, checkpoint = 0, version_in(key('policy'))
  for _, run in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    if redis.call('EXISTS', key('exact', run)) == 1 then
      local adapter = version_in(key('policy', run))
      if checkpoint or adapter then ended = ended + end_stale_of(run, math.max(checkpoint or 0, adapter or 0)) end
    end
  end
  for _, batch in pairs(told) do tell_ended(unpack(batch)) end
  return ended
end

-- Only the lanes tell whether somebody added entries by hand; a host is to dead-letter those first.
local function empty(run)
  for _, lane in ipairs(LANES) do
    if (try('XLEN', key('jobs', run, lane)) or 1) > 0 then return false end
  end
  return redis.call('EXISTS', key('open', run)) == 0
end

local function forget_runs()
  local now, forgotten = now_ms(), 0
  for _, run in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    local facts = try('HMGET', key('runs', run), 'open', 'touched_ms') or {}
    if (tonumber(facts[1]) or 0) == 0 and now - (tonumber(facts[2]) or 0) > idle and empty(run) then
      redis.call('SREM', KEYS[1], run)
      for _, lane in ipairs(LANES) do redis.call('UNLINK', key('jobs', run, lane), key('ready', run, lane)) end
      redis.call('UNLINK', key('parked', run), key('exact', run))
      redis.call('EXPIRE', key('runs', run), retention)
      forgotten = forgotten + 1
    end
  end
  return forgotten
end

return {end_all_stale(), forget_runs()}
