-- ratelimit.lua counts events in fixed windows. Each command is atomic and costs one round trip.
--
-- KEYS are the counters, all in one slot of a Redis Cluster. ARGV[1] names the command, ARGV[2]
-- is the window in seconds. One number for each counter follows.
--
-- ratelimit.go puts a first line before this text that lets it run while the memory of Redis is
-- full (allow-oom). Otherwise a full Redis would also close the routes that free its memory.

local window_ms = ARGV[2] * 1000

-- number returns what ARGV has for the counter KEYS[i].
local function number(i)
  return tonumber(ARGV[2 + i])
end

-- count returns how many events a counter has counted in its window.
local function count(key)
  return tonumber(redis.call('GET', key) or 0)
end

-- remaining_ms returns how long the window of a counter lasts. It gives a counter without a TTL
-- a new window: the first event opens one, and a lost TTL must not close an account for ever.
local function remaining_ms(key)
  local ms = redis.call('PTTL', key)
  if ms < 0 then
    ms = window_ms
    redis.call('PEXPIRE', key, ms)
  end
  return math.max(ms, 1)
end

local command = {}

-- take counts one event on every counter, or on none if one of them has reached its maximum. It
-- returns how many more events the tightest counter allows, or -1 if this event was one too many,
-- and the milliseconds until the window ends of the counter that decided.
function command.take()
  local left, wait_ms = math.huge, 0
  for i, key in ipairs(KEYS) do
    if count(key) >= number(i) then
      left = -1
      wait_ms = math.max(wait_ms, remaining_ms(key))
    end
  end
  if left == -1 then
    return {left, wait_ms}
  end

  for i, key in ipairs(KEYS) do
    local after = redis.call('INCR', key)
    local ms = remaining_ms(key)
    if number(i) - after < left then
      left = number(i) - after
      wait_ms = ms
    end
  end
  return {left, wait_ms}
end

-- give_back takes a number of events off each counter. A counter never falls below zero.
function command.give_back()
  for i, key in ipairs(KEYS) do
    if count(key) > number(i) then
      redis.call('DECRBY', key, number(i))
    else
      redis.call('DEL', key)
    end
  end
end

return command[ARGV[1]]() or redis.status_reply('OK')
