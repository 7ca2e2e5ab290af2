package contract

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
)

// document is openapi.yaml, and what of it the tests have reached.
var document = loadDocument("../openapi.yaml")

type openAPI struct {
	*openapi3.T
	err       error
	router    routers.Router
	elsewhere *openapi3.Operation // what it says of the requests that no operation can list
	reached   sync.Map            // "POST /auth/login 401" to true
}

func loadDocument(file string) *openAPI {
	d := &openAPI{}
	loader := openapi3.NewLoader()
	if d.T, d.err = loader.LoadFromFile(file); d.err != nil {
		return d
	}
	if d.err = d.Validate(context.Background()); d.err != nil {
		return d
	}
	d.Servers = nil // the tests' servers are at other addresses
	if d.err = d.resolveElsewhere(loader); d.err != nil {
		return d
	}
	d.router, d.err = gorillamux.NewRouter(d.T)
	return d
}

// resolveElsewhere reads what the document has beside its paths, in the form of an operation. The
// loader follows the references of an operation only on a path.
func (d *openAPI) resolveElsewhere(loader *openapi3.Loader) error {
	extension, err := json.Marshal(d.Extensions["x-elsewhere"])
	if err != nil {
		return err
	}
	if err := json.Unmarshal(extension, &d.elsewhere); err != nil {
		return err
	}
	d.Paths.Set("/elsewhere", &openapi3.PathItem{Get: d.elsewhere})
	defer d.Paths.Delete("/elsewhere")
	return loader.ResolveRefsIn(d.T, nil)
}

// find is what the document says of a request, and the place where it says so.
func (d *openAPI) find(req *http.Request) (*openapi3filter.RequestValidationInput, string) {
	route, params, err := d.router.FindRoute(req)
	place := "elsewhere"
	if err == nil {
		place = route.Method + " " + route.Path
	} else {
		route = &routers.Route{Spec: d.T, Operation: d.elsewhere}
	}
	return &openapi3filter.RequestValidationInput{
		Request:    req,
		PathParams: params,
		Route:      route,
		Options: &openapi3filter.Options{
			IncludeResponseStatus: true,
			MultiError:            true,
			AuthenticationFunc:    openapi3filter.NoopAuthenticationFunc,
		},
	}, place
}

// validate holds an answer to the document, and the request as well if it was answered with
// success: the tests send many that are deliberately wrong.
func (d *openAPI) validate(a *answer, req *http.Request) {
	if d.err != nil {
		a.server.Fatalf("openapi.yaml: %v", d.err)
	}
	copied := req.Clone(context.Background())
	copied.Body = io.NopCloser(bytes.NewReader(a.asked.body))
	input, place := d.find(copied)
	if place == "elsewhere" && req.Method == http.MethodHead {
		return // it goes where GET goes, without the body that could be validated
	}
	if a.StatusCode < 400 && place != "elsewhere" {
		err := openapi3filter.ValidateRequest(context.Background(), input)
		a.expect(err == nil, "a success for what is no request of openapi.yaml: %v", err)
	}
	err := validateAnswer(input, a.StatusCode, a.Header, a.body)
	a.expect(err == nil, "it is no answer of openapi.yaml: %v", err)
	d.reached.Store(place+" "+strconv.Itoa(a.StatusCode), true)
}

func validateAnswer(
	input *openapi3filter.RequestValidationInput, status int, header http.Header, body []byte,
) error {
	return openapi3filter.ValidateResponse(context.Background(),
		&openapi3filter.ResponseValidationInput{
			RequestValidationInput: input,
			Status:                 status,
			Header:                 header,
			Body:                   io.NopCloser(bytes.NewReader(body)),
			Options:                input.Options,
		})
}

// described are the operations of the document, and what it says elsewhere.
func (d *openAPI) described() map[string]*openapi3.Operation {
	all := map[string]*openapi3.Operation{"elsewhere": d.elsewhere}
	for path, item := range d.Paths.Map() {
		for method, operation := range item.Operations() {
			all[method+" "+path] = operation
		}
	}
	return all
}

// TestOpenAPI comes after TestContract, in the order of the files: it asks what of the document
// that suite has reached.
func TestOpenAPI(t *testing.T) {
	if document.err != nil || !document.IsOpenAPI31OrLater() {
		t.Fatalf("no document of OpenAPI 3.1: %v", document.err)
	}
	t.Run("describes the contract's routes and no others", func(t *testing.T) {
		got := slices.Sorted(maps.Keys(document.described()))
		if want := append(slices.Sorted(maps.Keys(routes)), "elsewhere"); !slices.Equal(got, want) {
			t.Errorf("the routes are %q, want %q", got, want)
		}
	})
	t.Run("knows an answer that is not the contract's", testStrictness)
	t.Run("every route and status was reached by the suite", func(t *testing.T) {
		if !testedWhole.Load() {
			t.Skip("TestContract did not run as a whole")
		}
		for route, operation := range document.described() {
			for status := range operation.Responses.Map() {
				_, reached := document.reached.Load(route + " " + status)
				if !reached && status != "503" { // of outages, which the root module tests
					t.Errorf("never reached: %s %s", route, status)
				}
			}
		}
	})
}

// testStrictness changes one thing at a time in an answer that the document describes.
func testStrictness(t *testing.T) {
	const good = `{"error": "Account is disabled", "statusCode": 403,
		"requestId": "0b8f7a52-52c8-4f0e-9c43-6a1f3c1f6f0e",
		"timestamp": "2026-02-27T10:00:00Z", "code": "account_disabled"}`
	header := http.Header{
		"Cache-Control":          {"no-store"},
		"Content-Type":           {"application/json; charset=utf-8"},
		"Vary":                   {"Origin"},
		"X-Content-Type-Options": {"nosniff"},
		"X-Request-Id":           {"0b8f7a52-52c8-4f0e-9c43-6a1f3c1f6f0e"},
	}
	input, _ := document.find(httptest.NewRequest("POST", "/auth/login", nil))
	if err := validateAnswer(input, 403, header, []byte(good)); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string][2]string{
		"a member is missing":              {`"error": "Account is disabled", `, ``},
		"a member too many":                {`"code"`, `"more": 1, "code"`},
		"a number as text":                 {`403`, `"403"`},
		"the number of another status":     {`403`, `401`},
		"a time that is not in UTC":        {`00Z`, `00+01:00`},
		"an id that is no UUID":            {`"0b8f7a52-`, `"0b8f7a5`},
		"a code that does not exist":       {`account_disabled`, `account_disable`},
		"a code of other answers":          {`account_disabled`, `invalid_credentials`},
		"details where nothing is invalid": {`"code"`, `"details": {"email": "x"}, "code"`},
	} {
		body := strings.Replace(good, change[0], change[1], 1)
		if validateAnswer(input, 403, header, []byte(body)) == nil {
			t.Errorf("%s: %s passes", what, body)
		}
	}
	for name := range header {
		lacking := header.Clone()
		lacking.Del(name)
		if validateAnswer(input, 403, lacking, []byte(good)) == nil {
			t.Errorf("an answer without %s passes", name)
		}
	}
	badRequest := strings.NewReplacer("403", "400", "account_disabled", "validation_failed")
	if validateAnswer(input, 400, header, []byte(badRequest.Replace(good))) == nil {
		t.Error("validation_failed without details passes")
	}
}
