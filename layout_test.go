package main

import (
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	// maxTokens bounds all production Go. Comments count nothing, and neither do the semicolons at
	// the ends of lines. So there is nothing to gain by writing more on a line.
	maxTokens = 32_500

	// maxColumns is as much of a line as a reviewer sees side by side with its older version. A tab
	// at the beginning counts four.
	maxColumns = 100

	// maxFunctionLines is about as much as one screen shows.
	maxFunctionLines = 60
)

// layout lists the production files. Of each it says which of the others the file may use, and
// which packages it may not import, as prefixes of their paths.
var layout = map[string]struct{ mayUse, mayNotImport string }{
	"jwt.go":        {"", "net/http github.com/ golang.org/"},
	"ratelimit.go":  {"", "net/http github.com/jackc/ golang.org/"},
	"store.go":      {"", "net/http golang.org/"},
	"mail.go":       {"jwt.go ratelimit.go store.go", "net/http github.com/ golang.org/"},
	"middleware.go": {"jwt.go ratelimit.go store.go mail.go", "github.com/ golang.org/"},
	"auth.go":       {"jwt.go ratelimit.go store.go mail.go middleware.go", "github.com/"},
	"main.go":       {"jwt.go ratelimit.go store.go mail.go middleware.go auth.go admin.go", ""},
	"admin.go":      {"jwt.go ratelimit.go store.go mail.go middleware.go auth.go main.go", ""},
}

// readFiles returns the texts of the files that match a pattern and are no tests.
func readFiles(t *testing.T, pattern string) map[string]string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(name, "_test.go") {
			files[name] = string(data)
		}
	}
	return files
}

// parseFiles parses the production Go. It also returns which of the package's own top-level
// declarations each identifier means.
func parseFiles(t *testing.T) (*token.FileSet, []*ast.File, map[*ast.Ident]types.Object) {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	for name, source := range readFiles(t, "*.go") {
		file, err := parser.ParseFile(fset, name, source, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	// Without an importer, each import is an error, and only our own declarations are known.
	config := types.Config{Error: func(error) {}}
	pkg, _ := config.Check("latchkey", fset, files, info)
	for id, object := range info.Uses {
		if object.Parent() != pkg.Scope() {
			delete(info.Uses, id)
		}
	}
	return fset, files, info.Uses
}

// TestBudget checks that the production Go is the files of layout and no others, and how much there
// is of it.
func TestBudget(t *testing.T) {
	files := readFiles(t, "*.go")
	total := 0
	for name, source := range files {
		if _, known := layout[name]; !known {
			t.Errorf("%s is not in the design", name)
		}
		total += countTokens(source)
	}
	if len(files) < len(layout) {
		t.Errorf("the design has %d files, and there are only %d", len(layout), len(files))
	}
	t.Logf("%d tokens of production Go", total)
	if total > maxTokens {
		t.Errorf("%d tokens of production Go, at most %d", total, maxTokens)
	}
}

func countTokens(source string) int {
	file := token.NewFileSet().AddFile("", -1, len(source))
	var s scanner.Scanner
	s.Init(file, []byte(source), nil, 0) // which leaves comments out
	for n := 0; ; n++ {
		switch _, tok, literal := s.Scan(); {
		case tok == token.EOF:
			return n
		case tok == token.SEMICOLON && literal != ";":
			n-- // the scanner has inserted it
		}
	}
}

func TestColumns(t *testing.T) {
	for _, pattern := range []string{"*.go", "*.lua"} {
		for name, source := range readFiles(t, pattern) {
			for i, line := range strings.Split(source, "\n") {
				tabs := len(line) - len(strings.TrimLeft(line, "\t"))
				columns := utf8.RuneCountInString(line) + 3*tabs
				if columns > maxColumns {
					t.Errorf("%s:%d: %d columns, at most %d", name, i+1, columns, maxColumns)
				}
			}
		}
	}
}

func TestWhoMayUseWhom(t *testing.T) {
	fset, files, objects := parseFiles(t)
	for _, file := range files {
		for _, spec := range file.Imports {
			path, _ := strconv.Unquote(spec.Path.Value)
			position := fset.Position(spec.Pos())
			for prefix := range strings.FieldsSeq(layout[position.Filename].mayNotImport) {
				if strings.HasPrefix(path, prefix) {
					t.Errorf("%v imports %s", position, path)
				}
			}
		}
	}
	used := map[string]bool{}
	for id, object := range objects {
		user := fset.Position(id.Pos())
		owner := fset.Position(object.Pos()).Filename
		used[user.Filename+" uses "+owner] = true
		mayUse := strings.Fields(layout[user.Filename].mayUse)
		if owner != user.Filename && !slices.Contains(mayUse, owner) {
			t.Errorf("%v uses %s of %s", user, id.Name, owner)
		}
	}
	// If these uses were not seen, the test would be blind.
	for _, use := range []string{
		"main.go uses auth.go", "auth.go uses store.go", "auth.go uses jwt.go",
		"middleware.go uses store.go",
	} {
		if !used[use] {
			t.Errorf("it was not seen that %s", use)
		}
	}
}

// TestHouseRules checks that no function is too long or named init, that no package variable
// changes, that only main ends the process, that jwt.go has no clock, and that SQL is in store.go.
func TestHouseRules(t *testing.T) {
	fset, files, objects := parseFiles(t)
	for _, file := range files {
		for _, decl := range file.Decls {
			function := ""
			if f, ok := decl.(*ast.FuncDecl); ok {
				function = f.Name.Name
			}
			begin := fset.Position(decl.Pos())
			n := fset.Position(decl.End()).Line - begin.Line + 1
			if function == "init" || function != "" && n > maxFunctionLines {
				t.Errorf("%v: %s is init, or has %d lines", begin, function, n)
			}
			for n := range ast.Preorder(decl) {
				if fault := houseRule(n, begin.Filename, function, objects); fault != "" {
					t.Errorf("%v: %s", fset.Position(n.Pos()), fault)
				}
			}
		}
	}
}

// sqlForm matches the beginning of an SQL statement.
var sqlForm = regexp.MustCompile(
	`(?is)^\s*(SELECT\s|INSERT\s+INTO\s|UPDATE\s.*\sSET\s|DELETE\s+FROM\s)`)

// houseRule returns which of the rules a node breaks, "" if it breaks none.
func houseRule(n ast.Node, file, function string, objects map[*ast.Ident]types.Object) string {
	switch n := n.(type) {
	case *ast.AssignStmt:
		return changedVariable(objects, n.Lhs...)
	case *ast.IncDecStmt:
		return changedVariable(objects, n.X)
	case *ast.RangeStmt:
		return changedVariable(objects, n.Key, n.Value)
	case *ast.SelectorExpr:
		switch types.ExprString(n) {
		case "os.Exit":
			if file != "main.go" || function != "main" {
				return "os.Exit outside main"
			}
		case "time.Now", "time.Since", "time.Until":
			if file == "jwt.go" {
				return "the clock is a parameter"
			}
		}
	case *ast.BasicLit:
		text, err := strconv.Unquote(n.Value)
		if err == nil && file != "store.go" && sqlForm.MatchString(text) {
			return "SQL outside store.go"
		}
	}
	return ""
}

// changedVariable names the package variable that an assignment to the targets changes. It is the
// first identifier in a target such as x, x.f, x[i] and *x.
func changedVariable(objects map[*ast.Ident]types.Object, targets ...ast.Expr) string {
	for _, target := range targets {
		if target == nil {
			continue // a range statement without a value
		}
		for n := range ast.Preorder(target) {
			id, isIdentifier := n.(*ast.Ident)
			if v, isVariable := objects[id].(*types.Var); isVariable {
				return "package variable " + v.Name() + " changes"
			}
			if isIdentifier {
				break
			}
		}
	}
	return ""
}

// TestModule checks that the module requires three others directly, and replaces none.
func TestModule(t *testing.T) {
	data, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	direct := regexp.MustCompile(`(?m)^(?:require)?\s+(\S+) v\S+$`)
	for _, match := range direct.FindAllSubmatch(data, -1) {
		got += string(match[1]) + " "
	}
	const want = "github.com/jackc/pgx/v5 github.com/redis/go-redis/v9 golang.org/x/crypto "
	if got != want || strings.Contains(string(data), "replace") {
		t.Errorf("go.mod requires %s directly, want %s", got, want)
	}
}
