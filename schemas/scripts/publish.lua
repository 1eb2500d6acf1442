-- Publish a policy: record it, make it current in its lineage, and tell the hosts, in one step.
-- KEYS[1] runs; ARGV: run; lineage; its prefix in `policies` ('' for checkpoints, 'RUN:' for adapters); version; record as
--   JSON; source; the record's own words for that; base ('' for none); 1 where the base was asked for, 0 where it is the
--   current checkpoint's; generation; ms of the publisher's lease; then the fields of the entry on `control`.
-- A version is live while its field in `policies` has no generation behind it (rollback.lua).
-- Returns {answer, number, text}:
--   new      version, record
--   same     version, the record from before: publishing again is harmless
--   other    version, the record from before: it names another source
--   old      the version that it has to be higher than
--   taken    the live version of this lineage that names this source already, so nobody could tell which made a token
--   held     ms left, the run that publishes checkpoints now
--   moved    generation of the lineage, which is another than was said
--   rebased  version of the current checkpoint (-1: none), its record: an adapter's base is another, or none
local run, lineage, prefix, version, record = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local source, words, base, base_asked, generation = ARGV[6], ARGV[7], ARGV[8], ARGV[9] == '1', tonumber(ARGV[10])
local lease = ARGV[11]
local FIRST = 12
local is_adapter = prefix ~= ''
local source_field = is_adapter and 'lora_path' or 'checkpoint'
local policies, publisher = key('policies'), key('publisher')

-- A field that somebody made by hand reads as no policy.
local function read(text)
  local is_json, policy = pcall(cjson.decode, text)
  return is_json and type(policy) == 'table' and policy or {}
end

local function is_same(policy)
  local their_base = type(policy.base) == 'string' and policy.base or ''
  return policy[source_field] == source and (not base_asked or their_base == base)
end

local holder = not is_adapter and try('GET', publisher)
local before = redis.call('HGET', policies, prefix .. version)
if before and is_same(read(before)) then
  if holder == run then redis.call('PEXPIRE', publisher, lease) end
  return {'same', tonumber(version), before}
end
if holder and holder ~= run then return {'held', redis.call('PTTL', publisher), holder} end
local current_generation = tonumber(redis.call('HGET', key('generations'), lineage) or 0)
if current_generation ~= generation then return {'moved', current_generation, ''} end
if before then return {'other', tonumber(version), before} end

local checkpoint = redis.call('GET', key('policy'))
local newest = tonumber(checkpoint or -1)
if is_adapter then
  local its = checkpoint and redis.call('HGET', policies, checkpoint) or ''
  if checkpoint and read(its).checkpoint ~= base or not checkpoint and base ~= '' and not base_asked then
    return {'rebased', newest, its}
  end
  newest = math.max(newest, tonumber(redis.call('GET', key('policy', run)) or -1))
end
if tonumber(version) <= newest then return {'old', newest, ''} end

local all = redis.call('HGETALL', policies)
for at = 1, #all, 2 do
  local name = all[at]
  local live = string.sub(name, 1, #prefix) == prefix and string.match(name, '^%d+$', #prefix + 1)
  if live and string.find(all[at + 1], words, 1, true) and read(all[at + 1])[source_field] == source then
    return {'taken', tonumber(live), ''}
  end
end

if not is_adapter then redis.call('SET', publisher, run, 'PX', lease) end
redis.call('HSET', policies, prefix .. version, record)
redis.call('SET', is_adapter and key('policy', run) or key('policy'), version)
write('XADD', key('control'), '*', unpack(ARGV, FIRST))
return {'new', tonumber(version), record}
