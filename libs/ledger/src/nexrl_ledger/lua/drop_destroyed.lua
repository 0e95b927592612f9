-- Drops the records of the groups that were destroyed first, beyond the last `kept`; none that was
-- destroyed after `before`. Those from before `expired` have gone by themselves. Returns how many.
-- args: kept, before, expired
local destroyed = unpack(KEYS)
redis.call('ZREMRANGEBYSCORE', destroyed, '-inf', '(' .. args.expired)
local excess = math.max(0, redis.call('ZCARD', destroyed) - args.kept)
local gone = redis.call('ZRANGEBYSCORE', destroyed, '-inf', '(' .. args.before, 'LIMIT', 0, excess)
for _, identifier in ipairs(gone) do
  redis.call('DEL', common.group_prefix .. identifier)
  redis.call('ZREM', destroyed, identifier)
end
return #gone
