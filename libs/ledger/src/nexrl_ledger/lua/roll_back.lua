-- Marks what was applied after `seq` as rolled back. Returns how many jobs, -1 where it is fenced.
-- args: epoch, seq
local group, applied = unpack(KEYS)
if redis.call('HGET', group, 'epoch') ~= args.epoch then return -1 end
return roll_back(group, applied, args.seq)
