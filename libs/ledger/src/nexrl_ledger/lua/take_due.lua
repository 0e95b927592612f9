-- Returns the jobs whose results were delivered before a time; nobody begins to read one any more.
-- args: before
local delivered = unpack(KEYS)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', delivered, '-inf', args.before)) do
  redis.call('ZADD', delivered, '+inf', id)
end
return redis.call('ZRANGEBYSCORE', delivered, '+inf', '+inf')
