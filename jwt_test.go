package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

var (
	testKeys  = keys{current: []byte("the key that signs and verifies!")}
	otherKeys = keys{current: []byte("the key of the other token type.")}
	testNow   = time.Unix(1_800_000_000, 0)
)

func testClaims() claims {
	return claims{UserID: "u-1", Email: "user@example.com", IssuedAt: testNow.Unix(), ExpiresAt: testNow.Unix() + 900,
		Subject: "u-1", SessionID: "s-1", TokenID: "t-1"}
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// mac signs what stands before a token's last dot, and shares no code with what it tests.
func mac(newHash func() hash.Hash, key []byte, signed string) string {
	h := hmac.New(newHash, key)
	h.Write([]byte(signed))
	return encode(string(h.Sum(nil)))
}

// craft makes a token of any header and payload, signed as it ought to be.
func craft(header, payload string) string { return forge(string(testKeys.current), header, payload) }

func checkVerify(t *testing.T, k keys, token string, want error) {
	t.Helper()
	got, err := k.verify(token, testNow)
	if !errors.Is(err, want) {
		t.Errorf("verify = %v, want %v", err, want)
	}
	if want != nil && got != (claims{}) {
		t.Errorf("a refused token gave claims: %+v", got)
	}
}

// RFC 7515 appendix A.1. Its header has another order and spacing than ours, so the HMAC has to match and
// the token has to be refused, in its time.
func TestRFC7515Example(t *testing.T) {
	const (
		signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9" +
			".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
		want = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
	)
	key, err := base64.RawURLEncoding.DecodeString("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
	if err != nil {
		t.Fatal(err)
	}
	if got := string(signature(key, signed)); got != want {
		t.Errorf("signature = %s, want %s", got, want)
	}
	if _, err := (keys{current: key}).verify(signed+"."+want, time.Unix(1300819379, 0)); !errors.Is(err, errTokenInvalid) {
		t.Errorf("verify = %v, want %v", err, errTokenInvalid)
	}
}

// The whole token, byte for byte; made with another implementation (Python's json, base64 and hmac).
func TestSignKnownAnswer(t *testing.T) {
	const want = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9" +
		".eyJ1c2VySWQiOiJ1LTEiLCJlbWFpbCI6InVzZXJAZXhhbXBsZS5jb20iLCJpYXQiOjE4MDAwMDAwMDAsImV4cCI6MTgwMDAwMDkwMCwic3ViIjoidS0xIiwic2lkIjoicy0xIiwianRpIjoidC0xIn0" +
		".8wiW5rHsqlEwFxpBVYgaSVwBT8LcMhGLsGqK142WeyM"
	if got := testKeys.sign(testClaims()); got != want {
		t.Errorf("sign =\n%s, want\n%s", got, want)
	}
	checkVerify(t, testKeys, want, nil)
}

func TestSignVerifyRoundTrip(t *testing.T) {
	for _, email := range []string{"", "user@example.com", `"\/<>&` + "\u2028\u00e9\U0001F511\x00\x1f"} {
		want := testClaims()
		want.Email, want.IssuedAt, want.ExpiresAt = email, math.MinInt64, math.MaxInt64
		got, err := testKeys.verify(testKeys.sign(want), testNow)
		if err != nil || got != want {
			t.Errorf("verify(sign(%+v)) = %+v, %v", want, got, err)
		}
	}
}

func TestVerifyKeys(t *testing.T) {
	old, older := testKeys, otherKeys
	rotated := keys{current: []byte("the key after the first rotation"), previous: old.current}
	twice := keys{current: []byte("the key after one more rotation."), previous: rotated.current}
	token := old.sign(testClaims())

	checkVerify(t, otherKeys, token, errTokenInvalid) // an access token shown as a refresh token, or the reverse
	checkVerify(t, keys{current: old.current, previous: older.current}, token, nil)
	checkVerify(t, rotated, token, nil)
	checkVerify(t, twice, token, errTokenInvalid)
	checkVerify(t, twice, rotated.sign(testClaims()), nil)
	checkVerify(t, old, rotated.sign(testClaims()), errTokenInvalid) // the previous key never signs

	expired := testClaims()
	expired.ExpiresAt = testNow.Unix()
	checkVerify(t, rotated, old.sign(expired), errTokenExpired)
}

// Anyone can sign with an empty key: a previous key that is not there must not verify, however that is written.
func TestVerifyRefusesEmptyKey(t *testing.T) {
	token := keys{current: []byte{}}.sign(testClaims())
	for _, k := range []keys{{testKeys.current, nil}, {testKeys.current, []byte{}}} {
		checkVerify(t, k, token, errTokenInvalid)
	}
}

func TestVerifyForgeries(t *testing.T) {
	good := testKeys.sign(testClaims())
	part := strings.Split(good, ".")
	payload, err := base64.RawURLEncoding.DecodeString(part[1])
	if err != nil {
		t.Fatal(err)
	}
	checkVerify(t, testKeys, good, nil)
	if craft(tokenHeader, string(payload)) != good {
		t.Fatal("craft differs from sign: the forgeries below would prove nothing")
	}

	tokens := map[string]string{
		"empty": "", "dots": "..", "one dot": ".", "four segments": good + ".", "leading dot": "." + good,
		"no header": "." + part[1] + "." + part[2], "no payload": part[0] + ".." + part[2], "no signature": part[0] + "." + part[1] + ".",
		"two segments": part[0] + "." + part[1], "signed empty payload": craft(tokenHeader, ""),
		"space before": " " + good, "space behind": good + " ", "line break behind": good + "\n", "quoted": `"` + good + `"`,
		"other payload":              part[0] + "." + encode(strings.Replace(string(payload), "u-1", "u-2", 2)) + "." + part[2],
		"signature of another token": part[0] + "." + part[1] + "." + strings.Split(testKeys.sign(claims{}), ".")[2],
	}
	for i := range good {
		tokens[fmt.Sprintf("cut at %d", i)] = good[:i]
	}
	for _, alg := range []string{"none", "None", "NONE", "nOnE", ""} {
		header := encode(`{"alg":"` + alg + `","typ":"JWT"}`)
		tokens["alg "+alg+" unsigned"] = header + "." + part[1] + "."
		tokens["alg "+alg+" signed"] = craft(`{"alg":"`+alg+`","typ":"JWT"}`, string(payload))
	}
	for alg, h := range map[string]func() hash.Hash{"HS384": sha512.New384, "HS512": sha512.New} {
		signed := encode(`{"alg":"`+alg+`","typ":"JWT"}`) + "." + part[1]
		tokens["right "+alg] = signed + "." + mac(h, testKeys.current, signed)
		tokens[alg+" under our header"] = part[0] + "." + part[1] + "." + mac(h, testKeys.current, part[0]+"."+part[1])
	}
	for _, header := range []string{
		`{"alg":"RS256","typ":"JWT"}`, `{"alg":"HS384","typ":"JWT"}`, `{"alg":"HS512","typ":"JWT"}`, `{"alg":"ES256","typ":"JWT"}`,
		`{"typ":"JWT","alg":"HS256"}`, `{"alg": "HS256","typ":"JWT"}`, `{"alg":"HS256","typ":"JWT"} `, " " + tokenHeader, tokenHeader + "\n",
		`{"alg":"HS256","typ":"JWT","kid":"1"}`, `{"alg":"HS256","typ":"JWT","crit":["exp"]}`, `{"alg":"HS256","typ":"JWT","zip":"DEF"}`,
		`{"alg":"HS256","typ":"JWT","jwk":{}}`, `{"alg":"HS256"}`, `{"alg":"HS256","typ":"jwt"}`, `{"alg":"hs256","typ":"JWT"}`,
		`{"alg":"HS256","alg":"HS256","typ":"JWT"}`, `{"\u0061lg":"HS256","typ":"JWT"}`, `{}`, ``, `null`,
	} {
		tokens["header "+header] = craft(header, string(payload))
	}
	for name, token := range tokens {
		t.Run(name, func(t *testing.T) { checkVerify(t, testKeys, token, errTokenInvalid) })
	}
}

// One token has one spelling: a second one would slip past whoever compares or blacklists tokens.
func TestVerifyNonCanonicalBase64(t *testing.T) {
	// Claims whose payload leaves 2 and 4 bits over in its last character.
	for _, email := range []string{"user@example.com", "user1@example.com", "user12@example.com"} {
		c := testClaims()
		c.Email = email
		good := testKeys.sign(c)
		part := strings.Split(good, ".")
		checkVerify(t, testKeys, good, nil)
		sign := func(payload string) string {
			signed := part[0] + "." + payload
			return signed + "." + mac(sha256.New, testKeys.current, signed)
		}
		spellings := map[string]string{
			"padded payload": sign(part[1] + "="), "twice padded payload": sign(part[1] + "=="), "padded signature": good + "=",
			"line feed in the payload":      sign(part[1][:8] + "\n" + part[1][8:]),
			"carriage return in it":         sign(part[1][:8] + "\r" + part[1][8:]),
			"line feed behind the payload":  sign(part[1] + "\n"),
			"line feed in the signature":    part[0] + "." + part[1] + "." + part[2][:8] + "\n" + part[2][8:],
			"line feed before the payload":  sign("\n" + part[1]),
			"space in the payload":          sign(part[1][:8] + " " + part[1][8:]),
			"one character left over":       sign(part[1] + "A"),
			"standard alphabet, signature":  part[0] + "." + part[1] + "." + strings.NewReplacer("-", "+", "_", "/").Replace(part[2]) + "=",
			"line feed in the header":       part[0] + "\n." + part[1] + "." + mac(sha256.New, testKeys.current, part[0]+"\n."+part[1]),
			"carriage return before header": "\r" + good,
		}
		// Every other last character that a lenient decoder reads as the same bytes.
		const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		for _, last := range alphabet {
			for i, s := range part[1:] {
				other := s[:len(s)-1] + string(last)
				same, _ := base64.RawURLEncoding.DecodeString(other)
				if want, _ := base64.RawURLEncoding.DecodeString(s); other == s || !bytes.Equal(same, want) {
					continue
				}
				if i == 0 {
					spellings["payload ending in "+string(last)] = sign(other)
				} else {
					spellings["signature ending in "+string(last)] = part[0] + "." + part[1] + "." + other
				}
			}
		}
		for name, token := range spellings {
			t.Run(email+" "+name, func(t *testing.T) { checkVerify(t, testKeys, token, errTokenInvalid) })
		}
	}
}

func TestVerifyClaims(t *testing.T) {
	const rest = `"userId":"u-1","email":"user@example.com","iat":1800000000,"sub":"u-1","sid":"s-1","jti":"t-1"`
	exp := func(value string) string { return `{` + rest + `,"exp":` + value + `}` }
	also := func(member string) string { return `{` + rest + `,"exp":1800000900,` + member + `}` }
	without := func(name string) string {
		kept := slices.DeleteFunc(strings.Split(rest+`,"exp":1800000900`, ","), func(m string) bool { return strings.HasPrefix(m, `"`+name+`"`) })
		return `{` + strings.Join(kept, ",") + `}`
	}
	instead := func(old, new string) string { return strings.Replace(exp("1800000900"), old, new, 1) }

	for _, test := range []struct {
		payload string
		want    error
	}{
		{exp("1800000900"), nil},
		{exp("1800000001"), nil},
		{exp("1800000000"), errTokenExpired}, // on exp, not only after it
		{exp("1799999999"), errTokenExpired},
		{exp("0"), errTokenExpired},
		{exp("-1"), errTokenExpired},
		{exp("9223372036854775807"), nil},
		{exp("9223372036854775808"), errTokenInvalid},
		{exp("-9223372036854775809"), errTokenInvalid},
		{exp("1" + strings.Repeat("0", 400)), errTokenInvalid},
		{exp("1800000900.0"), errTokenInvalid},
		{exp("1800000900.5"), errTokenInvalid},
		{exp("18000009e2"), errTokenInvalid},
		{exp("1.8000009E9"), errTokenInvalid},
		{exp(`"1800000900"`), errTokenInvalid},
		{exp("null"), errTokenInvalid},
		{exp("true"), errTokenInvalid},
		{exp("[1800000900]"), errTokenInvalid},
		{exp("{}"), errTokenInvalid},
		{exp("01800000900"), errTokenInvalid},
		{exp("+1800000900"), errTokenInvalid},
		{exp("0x6b49d284"), errTokenInvalid},
		{exp("1_800_000_900"), errTokenInvalid},
		{exp(""), errTokenInvalid},
		{without("exp"), errTokenInvalid},
		{`{` + rest + `,"EXP":1800000900}`, errTokenInvalid},
		{also(`"exp":1800000900`), errTokenInvalid},
		{also(`"\u0065xp":1800000900`), errTokenInvalid},
		{also(`"EXP":1`), nil}, // another name, and unknown

		{also(`"nbf":1799999999`), nil},
		{also(`"nbf":1800000000`), nil},
		{also(`"nbf":1800000001`), errTokenInvalid},
		{also(`"nbf":"1"`), errTokenInvalid},
		{also(`"nbf":1.5`), errTokenInvalid},
		{also(`"nbf":null`), errTokenInvalid},
		{`{` + rest + `,"nbf":1800000001,"exp":1}`, errTokenInvalid},

		{instead(`"iat":1800000000`, `"iat":1900000000`), nil}, // clocks differ
		{instead(`"iat":1800000000`, `"iat":"1800000000"`), errTokenInvalid},

		{without("userId"), errTokenInvalid},
		{without("sub"), errTokenInvalid},
		{without("sid"), errTokenInvalid},
		{without("jti"), errTokenInvalid},
		{instead(`"sub":"u-1"`, `"sub":"u-2"`), errTokenInvalid},
		{instead(`"userId":"u-1"`, `"userId":"U-1"`), errTokenInvalid},
		{instead(`"userId":"u-1"`, `"userid":"u-1"`), errTokenInvalid},
		{instead(`"sid":"s-1"`, `"SID":"s-1"`), errTokenInvalid},
		{instead(`"sid":"s-1"`, `"sid":""`), errTokenInvalid},
		{instead(`"sid":"s-1"`, `"sid":1`), errTokenInvalid},
		{instead(`"jti":"t-1"`, `"jti":null`), errTokenInvalid},
		{instead(`"email":"user@example.com"`, `"email":["user@example.com"]`), errTokenInvalid},
		{instead("user@example.com", "user\xff@example.com"), errTokenInvalid},
		{instead("user@example.com", "user\xed\xa0\x80@example.com"), errTokenInvalid}, // a surrogate in UTF-8
		{instead("user@example.com", `user\ud800@example.com`), errTokenInvalid},
		{instead("user@example.com", `user\udd11\ud83d@example.com`), errTokenInvalid},
		{instead("user@example.com", `user\ud83d\udd11@example.com`), nil},
		{also(`"sid":"s-1"`), errTokenInvalid},
		{also(`"x":1,"x":2`), errTokenInvalid},
		{also(`"x":{"y":1,"y":2}`), errTokenInvalid},
		{also(`"x":{"y":[1,2,{}]}`), nil},
		{" \t\r\n" + exp("1800000900") + " \t\r\n", nil},
		{exp("1800000900") + "x", errTokenInvalid},
		{exp("1800000900") + exp("1800000900"), errTokenInvalid},
		{"\ufeff" + exp("1800000900"), errTokenInvalid},
		{"[" + exp("1800000900") + "]", errTokenInvalid},
		{"null", errTokenInvalid},
		{"", errTokenInvalid},
		{"{}", errTokenInvalid},
	} {
		t.Run(test.payload[:min(len(test.payload), 200)], func(t *testing.T) {
			checkVerify(t, testKeys, craft(tokenHeader, test.payload), test.want)
		})
	}
}

// Whoever cannot sign does not learn whether the claims would have passed.
func TestVerifyChecksSignatureFirst(t *testing.T) {
	expired := testClaims()
	expired.ExpiresAt = 1
	checkVerify(t, testKeys, testKeys.sign(expired), errTokenExpired)
	checkVerify(t, testKeys, otherKeys.sign(expired), errTokenInvalid)
	token := testKeys.sign(expired)
	checkVerify(t, testKeys, token[:len(token)-1], errTokenInvalid)
}

func TestVerifySize(t *testing.T) {
	for size, want := range map[int]error{4095: nil, 4096: nil, 4097: errTokenInvalid} {
		c := testClaims()
		token := testKeys.sign(c)
		for len(token) < size {
			c.Email += "x"
			token = testKeys.sign(c)
		}
		if len(token) != size {
			t.Fatalf("no token of %d bytes", size)
		}
		checkVerify(t, testKeys, token, want)
	}
}

func TestReadObject(t *testing.T) {
	deep := func(depth int) string {
		return `{"a":` + strings.Repeat(`[{"b":`, depth) + "1" + strings.Repeat("}]", depth) + "}"
	}
	for _, test := range []struct {
		data string
		want map[string]string // the raw values by name; nil where data must be refused
	}{
		{`{}`, map[string]string{}},
		{" \t\r\n{ \t\r\n} \t\r\n", map[string]string{}},
		{`{"a":1}`, map[string]string{"a": "1"}},
		{" {\n\t\"a\"\r\n :\t\"x\" ,\r\"b\" : [ 1 , {\"a\" : 2 } ] ,\"c\":null}\n", map[string]string{"a": `"x"`, "b": `[ 1 , {"a" : 2 } ]`, "c": "null"}},
		{`{"a":true,"b":false,"c":-1.5e+3,"d":0,"e":"","f":[],"g":{}}`,
			map[string]string{"a": "true", "b": "false", "c": "-1.5e+3", "d": "0", "e": `""`, "f": "[]", "g": "{}"}},
		{`{"a":"}","b":"\"}\\","c":"\\\"","d":"[{,:"}`, map[string]string{"a": `"}"`, "b": `"\"}\\"`, "c": `"\\\""`, "d": `"[{,:"`}},
		{`{"":1}`, map[string]string{"": "1"}},
		{`{"email":1,"Email":2,"EMAIL":3}`, map[string]string{"email": "1", "Email": "2", "EMAIL": "3"}},
		{`{"\u0065mail":1}`, map[string]string{"email": "1"}},
		{`{"a":"\u0000","\u0000":"\u0000\u0000"}`, map[string]string{"a": `"\u0000"`, "\x00": `"\u0000\u0000"`}},
		{`{"a":"\ud83d\udd11","\uD83D\uDD11":1}`, map[string]string{"a": `"\ud83d\udd11"`, "\U0001F511": "1"}},
		{`{"a":"\\ud800","b":"\\\\ud800"}`, map[string]string{"a": `"\\ud800"`, "b": `"\\\\ud800"`}}, // an escaped backslash, no surrogate
		{`{"a":"\ufffd","b":"` + "\ufffd" + `"}`, map[string]string{"a": `"\ufffd"`, "b": "\"\ufffd\""}},
		{`{"a":{"x":1},"b":{"x":1}}`, map[string]string{"a": `{"x":1}`, "b": `{"x":1}`}},
		{`{"a":[{"x":1},{"x":1}]}`, map[string]string{"a": `[{"x":1},{"x":1}]`}},
		{deep(1000), map[string]string{"a": deep(1000)[5 : len(deep(1000))-1]}},

		{``, nil},
		{` `, nil},
		{`null`, nil},
		{`1`, nil},
		{`"a"`, nil},
		{`[]`, nil},
		{`[{"a":1}]`, nil},
		{`{`, nil},
		{`{"a"`, nil},
		{`{"a":`, nil},
		{`{"a":1`, nil},
		{`{"a":1,}`, nil},
		{`{,"a":1}`, nil},
		{`{"a":1,,"b":2}`, nil},
		{`{"a" 1}`, nil},
		{`{"a"::1}`, nil},
		{`{a:1}`, nil},
		{`{'a':1}`, nil},
		{`{1:1}`, nil},
		{`{"a":01}`, nil},
		{`{"a":.5}`, nil},
		{`{"a":1.}`, nil},
		{`{"a":+1}`, nil},
		{`{"a":NaN}`, nil},
		{`{"a":True}`, nil},
		{`{"a":[1,]}`, nil},
		{`{"a":"` + "\n" + `"}`, nil},
		{`{"a":"` + "\x00" + `"}`, nil},
		{`{"a":"\x41"}`, nil},
		{`{"a":"\u12"}`, nil},
		{`{"a":1}/**/`, nil},
		{"{\"a\":1}\x00", nil},
		{"{\"a\":1}\u00a0", nil},
		{"\v{\"a\":1}", nil},
		{"\ufeff{\"a\":1}", nil},
		{`{"a":1}{}`, nil},
		{`{"a":1} x`, nil},
		{`{"a":1}}`, nil},

		{`{"a":1,"a":1}`, nil},
		{`{"a":1,"b":2,"\u0061":3}`, nil},
		{`{"email":1,"\u0065mail":2}`, nil},
		{`{"\ud83d\udd11":1,"` + "\U0001F511" + `":2}`, nil},
		{`{"/":1,"\/":2}`, nil},
		{`{"":1,"":2}`, nil},
		{`{"a":{"x":1,"x":2}}`, nil},
		{`{"a":[[{"b":{"x":1,"y":[],"x":2}}]]}`, nil},
		{`{"a":{"x":1,"\u0078":2}}`, nil},

		{"{\"a\":\"\xff\"}", nil},
		{"{\"\xff\":1}", nil},
		{"{\"a\":\"\xc0\xaf\"}", nil},                   // overlong
		{"{\"a\":\"\xed\xa0\xbd\xed\xb4\x91\"}", nil},   // CESU-8
		{"{\"a\":{\"b\":[\"\xf4\x90\x80\x80\"]}}", nil}, // beyond U+10FFFF
		{"{\"a\":\"\xe2\x82\"}", nil},                   // cut short
		{`{"a":"\ud800"}`, nil},
		{`{"a":"\udc00"}`, nil},
		{`{"a":"\ud800\ud800"}`, nil},
		{`{"a":"\udc00\ud800"}`, nil},
		{`{"a":"\ud800x"}`, nil},
		{`{"a":"\ud800\n"}`, nil},
		{`{"a":"\ud800\\udc00"}`, nil},
		{`{"a":"\ud800\u0041"}`, nil},
		{`{"a":"\ud83d\udd11\udd11"}`, nil},
		{`{"\ud800":1}`, nil},
		{`{"a":["\ud800"]}`, nil},
		{`{"a":{"\udfff":1}}`, nil},
		{strings.Repeat(`{"a":`, 100_000), nil},
		{deep(100_000), nil},
	} {
		t.Run(test.data[:min(len(test.data), 100)], func(t *testing.T) {
			got, err := readObject([]byte(test.data))
			if (err == nil) != (test.want != nil) {
				t.Fatalf("readObject = %v, accepted should be %v", err, test.want != nil)
			}
			if test.want != nil && !maps.Equal(got, test.want) {
				t.Errorf("members = %q, want %q", got, test.want)
			}
		})
	}
}

// strictly reads the next value of d with encoding/json's own tokens: an error where an object at any depth has a
// member twice. It collects all strings on the way.
func strictly(d *json.Decoder, texts *[]string) error {
	token, err := d.Token()
	if err != nil {
		return err
	}
	switch token := token.(type) {
	case string:
		*texts = append(*texts, token)
	case json.Delim:
		seen := map[string]bool{}
		for d.More() {
			if token == '{' {
				name, err := d.Token()
				if err != nil {
					return err
				}
				if seen[name.(string)] {
					return fmt.Errorf("%q twice", name)
				}
				seen[name.(string)] = true
				*texts = append(*texts, name.(string))
			}
			if err := strictly(d, texts); err != nil {
				return err
			}
		}
		_, err = d.Token()
	}
	return err
}

// readObject accepts exactly the valid JSON objects that encoding/json reads without losing anything, and
// reads the same out of them.
func FuzzReadObject(f *testing.F) {
	for _, seed := range []string{`{}`, ` {"a" : [1,{"b":"\u0041\ud83d\udd11"}], "email":"x@y", "\u0065mail":null}`, `{"a":{"b":1,"b":2}}`,
		`{"a":"\ud800"}`, "{\"a\":\"\xff\"}", `{"\\":"\"\\"}`, `{"a":-1.5e+3,"":true}`, "\ufeff{}", `{"a":1}x`, `[]`, "{\"\ufffd\":\"\\ufffd\"}",
		"{\"a\":\"\\u0000\",\"b\":[[],{},\"]\",\"}\"]}\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := readObject(data)
		var texts []string
		var want map[string]json.RawMessage
		strict := strictly(json.NewDecoder(bytes.NewReader(data)), &texts)
		if strict == nil {
			strict = json.Unmarshal(data, &want) // one object, and nothing behind it
		}
		if strict == nil && (want == nil || !utf8.Valid(data)) {
			strict = errors.New("null, or no UTF-8")
		}
		if err == nil && strict != nil {
			t.Fatalf("accepted %q, which is not strict JSON: %v", data, strict)
		}
		if strict != nil {
			return
		}
		// encoding/json puts U+FFFD where an escape names half a surrogate pair.
		replaced := strings.Contains(strings.Join(texts, ""), "\ufffd")
		asWritten := bytes.Contains(data, []byte("\ufffd")) || bytes.Contains(bytes.ToLower(data), []byte(`\ufffd`))
		if asWritten && err != nil {
			return // a replacement character of either origin
		}
		if lost := replaced && !asWritten; (err == nil) == lost {
			t.Fatalf("readObject(%q) = %v, half a surrogate pair in it: %v", data, err, lost)
		}
		if err == nil && !maps.EqualFunc(got, want, func(a string, b json.RawMessage) bool { return a == string(b) }) {
			t.Fatalf("readObject(%q) = %q, encoding/json says %q", data, got, want)
		}
	})
}

// verify accepts nothing but what sign made, byte for byte. What stands before a token's last dot is also signed as it
// ought to be, to get the fuzzer past the signature: what is accepted then, encoding/json reads the same way.
func FuzzVerify(f *testing.F) {
	good := testKeys.sign(testClaims())
	part := strings.Split(good, ".")
	for _, seed := range []string{good, good[:len(good)-1], good + "=", part[0] + "." + part[1] + ".", "..", "",
		craft(`{"alg":"none","typ":"JWT"}`, `{}`), otherKeys.sign(testClaims()), part[0] + "." + part[1] + "\n." + part[2]} {
		f.Add(seed)
	}
	for _, payload := range []string{`{"exp":18e8}`, `{"userId":"u","sub":"u","sid":"s","jti":"j","exp":1800000900,"nbf":1,"x":[{}]} `} {
		f.Add(encode(tokenHeader) + "." + encode(payload) + ".")
	}
	f.Fuzz(func(t *testing.T, token string) {
		if c, err := testKeys.verify(token, testNow); err == nil && testKeys.sign(c) != token {
			t.Fatalf("accepted %q, which sign did not make", token)
		}

		signed := token[:max(0, strings.LastIndexByte(token, '.'))]
		c, err := testKeys.verify(signed+"."+mac(sha256.New, testKeys.current, signed), testNow)
		if err != nil {
			return
		}
		payload, ok := strings.CutPrefix(signed, encode(tokenHeader)+".")
		data, err := base64.RawURLEncoding.DecodeString(payload)
		if !ok || err != nil || encode(string(data)) != payload {
			t.Fatalf("accepted %q: not our header, or not canonical base64url", signed)
		}
		var members map[string]json.RawMessage
		if err := json.Unmarshal(data, &members); err != nil {
			t.Fatalf("accepted %q: %v", data, err)
		}
		var want claims
		for name, field := range map[string]any{"userId": &want.UserID, "sub": &want.Subject, "sid": &want.SessionID, "jti": &want.TokenID, "exp": &want.ExpiresAt} {
			if err := json.Unmarshal(members[name], field); err != nil {
				t.Fatalf("accepted %q: %s: %v", data, name, err)
			}
		}
		want.Email, want.IssuedAt = c.Email, c.IssuedAt // need not be there
		if c != want || c.ExpiresAt <= testNow.Unix() || c.UserID == "" || c.UserID != c.Subject || c.SessionID == "" || c.TokenID == "" {
			t.Fatalf("read %+v from %q", c, data)
		}
	})
}
