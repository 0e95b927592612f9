-- Begins a new incarnation of a group and returns its epoch, which is higher than any before: that
-- fences the old incarnation off. Returns -1 where the group is gone.
-- args: placement, now
local group = unpack(KEYS)
local state = redis.call('HGET', group, 'state')
if not state or state == 'destroyed' then return -1 end
local epoch = redis.call('HINCRBY', group, 'epoch', 1)
redis.call('HSET', group, 'state', 'starting', 'placement', args.placement, 'heartbeat', args.now)
redis.call('HDEL', group, 'cause', 'running_job')
return epoch
