-- Stands before every script, each of which changes several records in one step, so that no client
-- ever sees half of it. `args` holds what a call says, `common` what every call says: prefixes of
-- keys that are found on the way, a channel, times to live. Their values are strings.
local args, common = cjson.decode(ARGV[1]), cjson.decode(ARGV[2])

-- Writes how a job ended, gives it its expiry, takes it off its queue and tells the waiters.
local function end_job(id, fields)
  local job = common.job_prefix .. id
  local queue = redis.call('HGET', job, 'queue')
  if not queue then return end
  redis.call('HSET', job, unpack(fields))
  redis.call('HDEL', job, 'waits_for')
  redis.call('EXPIRE', job, common.result_ttl)
  local key = redis.call('HGET', job, 'key')
  if key then redis.call('EXPIRE', common.idempotency_prefix .. key, common.tombstone_ttl) end
  redis.call('ZREM', common.waiting_prefix .. queue, id)
  redis.call('PUBLISH', common.ended_channel, id)
end

-- Jobs whose effect is not in weights of that `seq` say so. Returns how many.
local function roll_back(group, applied, seq)
  local lost = redis.call('ZRANGEBYSCORE', applied, '(' .. seq, '+inf')
  for _, id in ipairs(lost) do
    local job = common.job_prefix .. id
    if redis.call('EXISTS', job) == 1 then redis.call('HSET', job, 'state', 'rolled_back') end
  end
  redis.call('ZREMRANGEBYSCORE', applied, '(' .. seq, '+inf')
  if tonumber(redis.call('HGET', group, 'seq') or '0') > tonumber(seq) then
    redis.call('HSET', group, 'seq', seq)
  end
  return #lost
end
