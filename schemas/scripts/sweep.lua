-- Look for what nobody will come back to: exact jobs of versions that no host serves, and runs that ended.
-- KEYS[1] runs; ARGV: ms after which a run without open jobs and uncommitted batches is forgotten, seconds its counters are
--   kept then, jobs looked at by one call, at most; then the versions that hosts serve or are changing to.
-- An exact job is stale once a newer policy is current and no host is on its version; while it is the current one, or
-- newer, a host may still come to it.
-- Returns {jobs ended, runs forgotten}.
local idle, retention, most = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local served = {}
for at = 4, #ARGV do served[tonumber(ARGV[at])] = true end
local told = {}

-- A name without fields in `waiting` is a tombstone, or somebody's own: it tells nothing of the job it names.
local function end_stale(name, version)
  local run, job = string.match(name, '^([^:]+):[^:]+:(.+)$')
  local batch, index = parse(job)
  local ended = 0
  if batch and try('HEXISTS', key('waiting'), name) == 1 then
    local reason = 'exact job for policy ' .. version .. ', which no host serves any more'
    ended = finish(run, batch, tonumber(index), tonumber(index), 'stale', reason)
    if ended > 0 then told[run .. ':' .. batch] = {run, batch} end
  end
  try('ZREM', key('exact'), name)
  return ended
end

-- Version by version, so that many jobs of one that is served hide none of another.
local function end_all_stale(current)
  local ended, looked, after = 0, 0, '-inf'
  while looked < most do
    local old = try('ZRANGEBYSCORE', key('exact'), after, '(' .. current, 'WITHSCORES', 'LIMIT', 0, 1) or {}
    local version = old[2]
    if not version then break end
    if not served[tonumber(version)] then
      for _, name in ipairs(redis.call('ZRANGEBYSCORE', key('exact'), version, version, 'LIMIT', 0, most - looked)) do
        ended, looked = ended + end_stale(name, version), looked + 1
      end
    end
    looked, after = looked + 1, '(' .. version
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
      redis.call('EXPIRE', key('runs', run), retention)
      forgotten = forgotten + 1
    end
  end
  return forgotten
end

local current = tonumber(try('GET', key('policy')))
return {current and end_all_stale(current) or 0, forget_runs()}
