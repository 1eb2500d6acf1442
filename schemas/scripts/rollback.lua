-- Go back to an earlier policy of a lineage: abandon those after it, open a new generation, and tell the hosts, in one step.
-- KEYS[1] runs; ARGV: run; lineage; its prefix in `policies` ('' for checkpoints, 'RUN:' for adapters); the version to go
--   back to; its record as JSON, in the new generation; generation and version that the lineage has now; ms of the
--   publisher's lease; then the fields of the entry on `control`.
-- An abandoned version is renamed in `policies` to VERSION@GENERATION. What is open of those versions is settled by whoever
-- called: what there is to do is in `generations`, at LINEAGE@GENERATION, as `TARGET LAST MS`: batches up to that time with
-- a tag after the target and up to the last version. It goes when it is done.
-- Returns {answer, number, text}:
--   new      generation
--   held     ms left, the run that publishes checkpoints now
--   moved    generation: the lineage is no more as the caller read it
local run, lineage, prefix, target, record = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local generation, current, lease = ARGV[6], ARGV[7], ARGV[8]
local FIRST = 9
local is_adapter = prefix ~= ''
local policies, generations, publisher = key('policies'), key('generations'), key('publisher')
local pointer = is_adapter and key('policy', run) or key('policy')

local holder = not is_adapter and try('GET', publisher)
if holder and holder ~= run then return {'held', redis.call('PTTL', publisher), holder} end
local current_generation = redis.call('HGET', generations, lineage) or '0'
local moved = current_generation ~= generation or redis.call('GET', pointer) ~= current
if moved or redis.call('HEXISTS', policies, prefix .. target) == 0 then
  return {'moved', tonumber(current_generation), ''}
end

-- Of a record: the generation that the policy belongs to. A field that somebody made by hand is of this one.
local function generation_in(text)
  local is_json, policy = pcall(cjson.decode, text)
  local value = is_json and type(policy) == 'table' and policy.generation
  return type(value) == 'number' and string.format('%d', value) or generation
end

for _, name in ipairs(redis.call('HKEYS', policies)) do
  local version = string.sub(name, 1, #prefix) == prefix and string.match(name, '^(%d+)$', #prefix + 1)
  if version and tonumber(version) > tonumber(target) then
    local abandoned = redis.call('HGET', policies, name)
    redis.call('HSET', policies, name .. '@' .. generation_in(abandoned), abandoned)
    redis.call('HDEL', policies, name)
  end
end

-- The admission rule counts the policies that were trained (enqueue.lua): those that are abandoned were too.
local function keep_count(of_run)
  local counters = key('runs', of_run)
  local from = number(try('HGET', counters, 'rule_version'), -1e15, 1e15, nil)
  if from then redis.call('HSET', counters, 'rule_version', from - tonumber(current) + tonumber(target)) end
end
if is_adapter then
  keep_count(run)
else
  for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    if redis.call('EXISTS', key('policy', name)) == 0 then keep_count(name) end
  end
end

local following = string.format('%d', tonumber(generation) + 1)
if not is_adapter then redis.call('SET', publisher, run, 'PX', lease) end
redis.call('HSET', policies, prefix .. target, record)
redis.call('SET', pointer, target)
redis.call('HSET', generations, lineage, following, lineage .. '@' .. following,
  target .. ' ' .. current .. ' ' .. string.format('%.0f', now_ms()))
write('XADD', key('control'), '*', unpack(ARGV, FIRST))
return {'new', tonumber(following), ''}
