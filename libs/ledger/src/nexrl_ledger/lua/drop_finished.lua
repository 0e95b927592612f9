-- Drops the oldest jobs, if they ended before a time and nobody holds their result. Returns how
-- many left the index.
-- args: count (how many to look at), now, before
local jobs, spent, delivered, forgotten = unpack(KEYS)
local gone = 0
for _, id in ipairs(redis.call('ZRANGE', jobs, 0, args.count - 1)) do
  local job = common.job_prefix .. id
  local queue, finished_at, key, payload =
    unpack(redis.call('HMGET', job, 'queue', 'finished_at', 'key', 'result_payload'))
  local held = redis.call('ZSCORE', delivered, id)
  local ended = finished_at and tonumber(finished_at) < tonumber(args.before)
  if not queue or (ended and (not held or held == 'inf')) then
    redis.call('ZREM', jobs, id)
    gone = gone + 1
    if queue then
      redis.call('DEL', job)
      if payload then redis.call('ZADD', delivered, '+inf', id) end
      if key and redis.call('DEL', common.idempotency_prefix .. key) == 1 then
        redis.call('ZADD', spent, args.now, key)
      end
      if (redis.call('GET', forgotten) or '') < id then redis.call('SET', forgotten, id) end
    end
  end
end
return gone
