-- Sets fields of a group, an empty value deletes one. Returns 'OK', or 'FENCED' for another epoch.
-- A group that is down or destroyed stays so: what its processes still say is not heard.
-- args: epoch (none: any), fields (name, value, ...)
local group = unpack(KEYS)
local epoch, state = unpack(redis.call('HMGET', group, 'epoch', 'state'))
if not state or state == 'down' or state == 'destroyed' then return 'FENCED' end
if args.epoch and epoch ~= args.epoch then return 'FENCED' end
for i = 1, #args.fields, 2 do
  local name, value = args.fields[i], args.fields[i + 1]
  if value == '' then
    redis.call('HDEL', group, name)
  else
    redis.call('HSET', group, name, value)
  end
end
return 'OK'
